"""How many batches a stage has, whatever its loaders tell; where its loaders come from, and where there are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import DataModule
from tests.conftest import child_processes
from tests.framework.models import Evaluated, Linear, Told, data, loader, quiet, weights
from tests.framework.test_trainer import Rows, Watch
from tests.programs import run_program


class OfOnesOwn:
    """A loader of so many batches, whose length tells another number of them."""

    def __init__(self, batches: int, told: int) -> None:
        self.batches, self.told = batches, told

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Iterator[Any]:
        return iter(loader(self.batches))


class BySize:
    """A batch sampler that makes so many batches, and tells another number of them."""

    def __init__(self, batches: int, told: int) -> None:
        self.batches, self.told = batches, told

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[2 * i, 2 * i + 1] for i in range(self.batches)])


class Unknown(BySize):
    """One that cannot tell, and says so in its own way."""

    def __len__(self) -> int:
        raise ValueError("num_steps is not given: the number of batches is not known")


class Samples(IterableDataset[Any]):
    """So many samples, without a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return iter(data(self.size))


# -- lengths that are estimates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [4, 5, 10])
@pytest.mark.parametrize(
    "make",
    [
        lambda told: DataLoader(Told(10, 2 * told), 2),
        lambda told: OfOnesOwn(5, told),
        lambda told: DataLoader(data(10), batch_sampler=BySize(5, told)),
    ],
)
def test_a_length_that_is_an_estimate(
    told: int, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All of a stream is read, in each stage, and validated after, whatever it tells; a line says if it tells less."""
    hooks = ("on_validation_batch_end", "on_test_batch_end", "on_predict_batch_end")
    module, watch, batches = (
        Evaluated(),
        Watch(lambda trainer: trainer.global_step, "on_validation_start"),
        Watch(lambda _: None, *hooks),
    )
    trainer = quiet(watch, batches, max_epochs=2, num_sanity_val_steps=-1)
    with caplog.at_level("INFO", "loopwright"):
        trainer.fit(module, make(told), make(told))
        assert trainer.num_training_batches == told
        assert trainer.num_val_batches == [told]
        trainer.test(module, make(told), verbose=False)
        assert len(trainer.predict(module, make(told)) or ()) == 5
    assert watch.values("on_validation_start") == [0, 5, 10]
    assert len(module.seen) == 10
    assert [len(batches.values(hook)) for hook in hooks] == [15, 5, 5]
    said = [
        record.message.rpartition(" ")[2]
        for record in caplog.records
        if "gives more than" in record.message
    ]
    assert said == (
        [f"limit_{name}_batches=4" for name in ("val", "train", "test", "predict")]
        if told == 4
        else []
    )


class Beginning:
    """Begins again when it has ended, as loaders do that fetch for a GPU: at the next read, or when it is iterated."""

    def __init__(self, at_once: bool) -> None:
        self.at_once, self.source = at_once, iter(loader(5))

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        if not self.at_once:
            self.source = iter(loader(5))
        return self

    def __next__(self) -> Any:
        try:
            return next(self.source)
        except StopIteration:
            if self.at_once:
                self.source = iter(loader(5))
            raise


def first_of(batch: Any) -> float:
    return float(batch[0][0, 0])


class Together(Evaluated):
    """Notes the first numbers of loaders that are read together."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first.append([first_of(each) for each in batch])
        return self.loss(batch[0])


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loader_that_begins_again_is_read_once(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In each epoch and evaluation: who has seen its end does not ask it again."""
    watch, module = Watch(lambda _: None, "on_validation_batch_end"), Evaluated()
    trainer = quiet(watch, max_epochs=2, num_sanity_val_steps=0)
    with caplog.at_level("INFO", "loopwright"):
        trainer.fit(module, Beginning(at_once), Beginning(at_once))
    assert (len(module.seen), len(watch.values("on_validation_batch_end"))) == (10, 10)
    assert len(trainer.predict(module, Beginning(at_once)) or ()) == 5
    together = Together()
    quiet(max_epochs=2).fit(
        together, [Beginning(at_once), Beginning(at_once), loader(2)]
    )
    own = [first_of(batch) for batch in loader(5)]
    assert together.first == 2 * [
        list(firsts)
        for firsts in zip(own, own, [*own[:2], *own[:2], own[0]], strict=True)
    ]
    assert not [
        record for record in caplog.records if "gives more than" in record.message
    ]


def test_a_stream_that_tells_nothing_or_zero(caplog: pytest.LogCaptureFixture) -> None:
    """Its length is not known: it is read to its end, and has no fraction."""
    with caplog.at_level("INFO", "loopwright"):
        module = Evaluated()
        quiet(val_check_interval=5).fit(
            module, DataLoader(Told(10, 0), 2), DataLoader(Told(10, 0), 2)
        )
    assert len(module.seen) == 5
    assert not [
        record for record in caplog.records if "gives more than" in record.message
    ]
    with pytest.raises(ValueError, match="the loader has no length"):
        quiet(limit_train_batches=0.5).fit(Evaluated(), DataLoader(Told(10, 0), 2))
    module = Evaluated()
    quiet().fit(module, DataLoader(data(10), batch_sampler=Unknown(5, 0)))
    assert len(module.seen) == 5


@pytest.mark.parametrize(
    ("arguments", "told", "trained", "after"),
    [
        ({"limit_train_batches": 4}, 2, 4, [4]),
        ({"limit_train_batches": 8}, 2, 5, [5]),
        ({"limit_train_batches": 0.5}, 8, 4, [4]),
        ({"limit_train_batches": 0.5}, 4, 2, [2]),
        (
            {"val_check_interval": 0.5},
            4,
            5,
            [2, 4],
        ),  # as often as asked for: not once more just after
        ({"val_check_interval": 0.5}, 6, 5, [3, 5]),
        ({"val_check_interval": 0.3}, 10, 5, [3, 5]),
        ({"val_check_interval": 0.5}, 20, 5, [5]),
        ({"val_check_interval": 2}, 3, 5, [2, 4]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 4, 5, [3]),
        ({"max_steps": 4}, 2, 4, []),
    ],
)
def test_limits_and_intervals_of_an_estimate(
    arguments: dict[str, Any], told: int, trained: int, after: list[int]
) -> None:
    """A number counts batches, a fraction is one of what the loader tells; an early end is validated like any other."""
    watch, module = (
        Watch(lambda trainer: trainer.global_step, "on_validation_start"),
        Evaluated(),
    )
    quiet(watch, **arguments).fit(module, DataLoader(Told(10, 2 * told), 2), loader(1))
    assert len(module.seen) == trained
    assert watch.values("on_validation_start") == after


def test_an_interval_that_no_epoch_reaches(caplog: pytest.LogCaptureFixture) -> None:
    """A number of batches that a stream does not have would never validate: that is said, once."""
    trainer = quiet(max_epochs=2, val_check_interval=6)
    trainer.fit(Evaluated(), DataLoader(Told(10, 20), 2), loader(1))
    assert [
        record.levelname
        for record in caplog.records
        if "val_check_interval=6" in record.message
    ] == ["WARNING"]
    assert trainer.callback_metrics == {}


def test_a_run_resumed_beyond_the_estimate() -> None:
    """The rest of the epoch is what is left of the data, not of the estimate."""
    batches = [
        DataLoader(Told(10, 4), 2),
        [DataLoader(Told(10, 6), 2), DataLoader(Told(10, 8), 2)],
    ]
    for given in batches:
        whole, cut, rest = Reads(), Reads(), Reads()
        quiet(max_epochs=2).fit(whole, given)
        stopped = quiet(max_epochs=2, max_steps=4)
        stopped.fit(cut, given)
        stopped.save_checkpoint("cut.ckpt")
        quiet(max_epochs=2).fit(rest, given, ckpt_path="cut.ckpt")
        assert len(whole.seen) == 10
        assert str(cut.seen + rest.seen) == str(whole.seen)


class Reads(Evaluated):
    """Trains on one loader's batches or on several's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(
            batch if isinstance(batch[0], Tensor) else batch[0], batch_idx
        )


# -- an epoch's end inside a window -----------------------------------------------------------------------------------


class Logs(Evaluated):
    """Logs by steps, and has schedulers that step by steps and by epochs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log("plateau", 1.0)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5
        )
        by_step = {"scheduler": plateau, "interval": "step", "monitor": "plateau"}
        return [optimizer], [
            by_step,
            torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
        ]


def of_windows_of_two(folder: str, batches: Any, **arguments: Any) -> Any:
    """What is seen of the steps of three epochs: by hooks after batches, loggers, checkpoints, schedulers; weights."""
    rows, save = Rows(), ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    steps = Watch(lambda trainer: trainer.global_step, "on_train_batch_end")
    rates = Watch(
        lambda trainer: trainer.optimizers[0].param_groups[0]["lr"],
        "on_train_epoch_end",
    )
    torch.manual_seed(0)
    module = Logs()
    trainer = quiet(
        steps,
        rates,
        save,
        logger=rows,
        log_every_n_steps=3,
        max_epochs=3,
        accumulate_grad_batches=2,
        **arguments,
    )
    trainer.fit(module, batches, loader(1))
    saved = sorted(
        int(path.name.removesuffix(".ckpt").rpartition("=")[2])
        for path in Path(folder).glob("*=*.ckpt")
    )
    logged = [step for step, row in rows.rows if "loss" in row]
    return (
        steps.values("on_train_batch_end"),
        logged,
        saved,
        rates.found,
        weights(module),
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"limit_train_batches": 5}, {"micro_batch": 1}]
)
def test_the_step_at_the_end_of_an_epoch_is_seen(arguments: dict[str, Any]) -> None:
    """Who counts steps sees that of an epoch's last, shorter window, with and without a length, right or wrong."""
    sized = of_windows_of_two("sized", loader(5), **arguments)
    assert sized[:3] == (
        [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9],
        [3, 6, 9],
        [3, 6, 9],
    )
    for told in (None, 4, 6, 10, 20):
        stream = Samples(10) if told is None else Told(10, told)
        streamed = of_windows_of_two(str(told), DataLoader(stream, 2), **arguments)
        assert streamed[:4] == sized[:4], told
        for mine, theirs in zip(streamed[4], sized[4], strict=True):
            torch.testing.assert_close(mine, theirs)
    by_size = of_windows_of_two(
        "by size", DataLoader(data(10), batch_sampler=BySize(5, told=3)), **arguments
    )
    assert by_size[:4] == sized[:4]


def test_the_step_of_a_skipped_epoch_is_seen() -> None:
    """The step on a window that a skip ends is logged, saved and seen by schedulers."""

    class Skips(Logs):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    rows, save = Rows(), ModelCheckpoint("saved", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet(save, logger=rows, log_every_n_steps=2, accumulate_grad_batches=2)
    trainer.fit(Skips(), loader(5))
    assert [step for step, row in rows.rows if "loss" in row] == [2]
    assert [path.name for path in Path("saved").glob("*=2.ckpt")] == [
        "epoch=0-step=2.ckpt"
    ]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


# -- no data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, [], (), {}])
def test_no_validation_data(nothing: Any) -> None:
    """A val_dataloader that returns nothing is as one that is not there; given loaders, too."""

    class Net(Evaluated):
        def val_dataloader(self) -> Any:
            return nothing

    for given in ({}, {"val_dataloaders": nothing}):
        save = ModelCheckpoint("saved")
        trainer = quiet(save, max_epochs=2, num_sanity_val_steps=2)
        trainer.fit(Net(), loader(), **given)
        assert trainer.global_step == 8
        assert not trainer.enable_validation
        assert save.best_model_path


def test_validation_data_that_come_later() -> None:
    """A loader that is made again may have data then."""

    class Net(Evaluated):
        def val_dataloader(self) -> Any:
            return [] if self.current_epoch < 1 else loader(1)

    watch = Watch(lambda trainer: trainer.current_epoch, "on_validation_start")
    quiet(watch, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Net(), loader())
    assert watch.values("on_validation_start") == [1, 2]


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_nothing_to_evaluate(nothing: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Results without data would say nothing: an error; no predictions are none, with a line."""

    class Net(Evaluated):
        def val_dataloader(self) -> Any:
            return nothing

        test_dataloader = predict_dataloader = val_dataloader

    for fn, name in (("validate", "val"), ("test", "test")):
        with pytest.raises(ValueError, match=f"{name}_dataloader returned no loader"):
            getattr(quiet(), fn)(Net())
        limited = quiet(**{f"limit_{name}_batches": 0})
        assert getattr(limited, fn)(Net()) == []
    assert quiet().predict(Net()) == []
    assert "predict_dataloader returned no loader" in caplog.text


# -- what a user may not have meant -----------------------------------------------------------------------------------


def lines_of(
    caplog: pytest.LogCaptureFixture, *arguments: Any, **trainer: Any
) -> list[str]:
    """What a fit says, from warnings on unless ``level`` tells another."""
    level = trainer.pop("level", "WARNING")
    caplog.clear()
    with caplog.at_level(level, "loopwright"):
        quiet(**trainer).fit(*arguments)
    return [
        record.getMessage() for record in caplog.records if record.levelname == level
    ]


def test_half_a_validation(caplog: pytest.LogCaptureFixture) -> None:
    """A step without a loader, or a loader without a step, is said, with the method that may be meant."""

    class Misnamed(DataModule):
        def train_dataloader(self) -> Any:
            return loader(1)

        def valid_dataloader(self) -> Any:
            return loader(1)

    class Makes(Linear):
        def val_dataloader(self) -> Any:
            return loader(1)

    (line,) = lines_of(caplog, Evaluated(), Misnamed(), max_epochs=2)
    assert "no validation loader: nothing is validated" in line
    assert "did you mean Misnamed.valid_dataloader" in line
    (line,) = lines_of(caplog, Evaluated(), loader(1))
    assert line.endswith("define val_dataloader()")
    (line,) = lines_of(caplog, Makes(), loader(1))
    assert "Makes has no validation_step: nothing is validated" in line
    assert lines_of(caplog, Evaluated(), loader(1), loader(1)) == []
    assert lines_of(caplog, Evaluated(), loader(1), limit_val_batches=0) == []
    with pytest.raises(
        ValueError, match=r"no validate loader.*did you mean Misnamed.valid_dataloader"
    ):
        quiet().validate(Evaluated(), datamodule=Misnamed())


def test_a_finished_run_that_is_fitted_again(caplog: pytest.LogCaptureFixture) -> None:
    """It says which limit was reached, and what to set."""
    for limit in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}):
        trainer, module = quiet(**limit), Linear()
        trainer.fit(module, loader(2))
        caplog.clear()
        trainer.fit(module, loader(2))
        (name, most) = list(limit.items())[-1]
        (line,) = [
            record.getMessage()
            for record in caplog.records
            if record.levelname == "WARNING"
        ]
        assert line.startswith(f"There is nothing to train: {name}={most} was reached")
        assert line.endswith(f"set trainer.{name} to more")


def test_a_step_that_returns_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The first time, it is said; an epoch without any step is an error."""

    class Sometimes(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class Never(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.loss(batch)

    class ByHand(Never):
        automatic_optimization = False

    (line,) = lines_of(caplog, Sometimes(), loader(4), max_epochs=2)
    assert line.startswith(
        "training_step returned None, so its batch is left out (epoch 0, batch 1)"
    )
    with pytest.raises(
        RuntimeError,
        match=r"no optimizer step was taken in epoch 0.*any of its 4 batches",
    ):
        quiet().fit(Never(), loader(4))
    (line,) = lines_of(caplog, ByHand(), loader(4), max_epochs=2)
    assert line.startswith("Manual optimization took no optimizer step in an epoch")


def test_fewer_steps_than_between_two_rows(caplog: pytest.LogCaptureFixture) -> None:
    """A line, where a logger is there to miss them."""
    for arguments, said in (
        ({"log_every_n_steps": 5}, True),
        ({"log_every_n_steps": 4}, False),
        ({"log_every_n_steps": 3, "accumulate_grad_batches": 2}, True),
        ({"log_every_n_steps": 0}, False),
        ({"log_every_n_steps": 5, "logger": False}, False),
    ):
        lines = lines_of(
            caplog, Linear(), loader(4), **{"logger": Rows(), **arguments}, level="INFO"
        )
        assert any("fewer than log_every_n_steps" in line for line in lines) is said, (
            arguments
        )


class Pretrained(nn.Module):
    """Layers in evaluation mode, as ``from_pretrained`` gives them."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))
        self.eval()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda module: None, "backbone (Pretrained), head.1 (Dropout)"),
        (lambda module: module.backbone.requires_grad_(False), "head.1 (Dropout)"),
        (
            lambda module: module.backbone.inner[0].weight.requires_grad_(False),
            "backbone (Pretrained), head.1 (Dropout)",
        ),
        (
            lambda module: (
                module.requires_grad_(False).layer.requires_grad_(True).eval()
            ),
            "layer (Linear), head.1 (Dropout)",
        ),
        (lambda module: module.eval(), "all of Net"),
        (lambda module: module.train(), None),
        (
            lambda module: (
                module.head.train(),
                setattr(module, "backbone", Pretrained(0.0)),
            ),
            "backbone (Pretrained)",
        ),
        (
            lambda module: (module.head.train(), module.backbone.inner[0].train()),
            "backbone (Pretrained)",
        ),
        (lambda module: (module.train(), module.norm.eval()), "norm (BatchNorm1d)"),
        (
            lambda module: (module.train(), module.norm.requires_grad_(False).eval()),
            None,
        ),
        (
            lambda module: (
                module.train(),
                module.relu.eval(),
                module.frozen.requires_grad_(False).eval(),
            ),
            None,
        ),
        (lambda module: setattr(module, "on_fit_start", module.train), None),
        (
            lambda module: (
                module.train(),
                setattr(module, "on_fit_start", module.eval),
            ),
            None,
        ),
    ],
)
def test_modules_in_evaluation_mode(
    change: Any, names: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The topmost ones that matter are named, once, unless a hook has put them into that mode or they are frozen."""

    class Net(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.relu, self.norm = (
                Pretrained(),
                nn.ReLU(),
                nn.BatchNorm1d(2),
            )
            self.frozen = nn.Linear(2, 2)
            self.head = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
            self.head[1].eval()

    module = Net()
    change(module)
    lines = lines_of(caplog, module, loader(1), max_epochs=2)
    assert [line.partition(": ")[2].partition(". ")[0] for line in lines] == (
        [names] if names else []
    )


class Twice(DataLoader):
    """Gives each batch again, and does not tell."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch
            yield batch


class Endless(DataLoader):
    """Ends where its length says, for whoever reads no further."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


class Changed(DataLoader):
    """Gives as many batches as it tells."""

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__())


@pytest.mark.parametrize(("kind", "lines"), [(Twice, 2), (Endless, 2), (Changed, 0)])
def test_a_loader_that_gives_more_than_its_length(
    kind: type, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left out of a map-style loader that iterates in its own way is said, once of each loader."""
    module, watch = (
        Evaluated(),
        Watch(lambda trainer: trainer.global_step, "on_validation_start"),
    )
    with caplog.at_level("WARNING", "loopwright"):
        quiet(watch, max_epochs=2).fit(module, kind(data(10), 2), kind(data(10), 2))
    assert watch.values("on_validation_start") == [5, 10]
    said = [
        record.message
        for record in caplog.records
        if "gives more than the 5 batches" in record.message
    ]
    assert len(said) == lines


# -- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["max_steps", "limit_train_batches"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_workers_end_with_a_fit_that_leaves_its_epoch(ends: str, is_stream: bool):
    """Though the Trainer lives on: nobody would wait for a garbage collection."""
    dataset = Told(40, 40) if is_stream else data(40)
    trainer = quiet(**{ends: 2})
    trainer.fit(Linear(), DataLoader(dataset, 2, num_workers=2))
    assert not child_processes()
    assert trainer.global_step == 2


def test_workers_end_with_a_run_though_its_loader_holds_its_epoch():
    """A stateful loader keeps its iteration, and goes on with it in the next fit."""
    loader = StatefulDataLoader(data(40), 2, num_workers=2)
    trainer, module = quiet(max_steps=2), Linear()
    for steps in (2, 4):
        trainer.max_steps = steps
        trainer.fit(module, loader)
        assert not child_processes()
    read = torch.cat(module.seen)
    assert torch.equal(read, data(40).tensors[0][:8])


def test_workers_end_with_a_run_though_its_error_holds_its_epoch():
    """As in a notebook, which keeps the last error, with its traceback."""

    class Fails(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        quiet().fit(Fails(), DataLoader(data(40), 2, num_workers=2))
    assert not child_processes()
    assert error.traceback


KILLED_WORKER = """
import os, signal, torch
from torch.utils.data import DataLoader, Dataset
from tests.framework.models import Linear, quiet


class Deadly(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(2)


quiet().fit(Linear(), DataLoader(Deadly(), 2, num_workers=1))
"""


def test_a_killed_worker_leaves_nothing_in_the_temporary_directory(tmp_path: Path):
    """Its sockets, by which the first batches came, lie in a folder."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(root)}
    ended = run_program("-c", KILLED_WORKER, env=environment)
    assert ended.returncode == 1
    assert not [*tmp_path.glob("pymp-*")]
