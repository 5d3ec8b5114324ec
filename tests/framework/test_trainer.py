"""What the Trainer's arguments do, and what can be read from it while it runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from loopwright.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    SimpleProfiler,
    Timer,
)
from loopwright.framework import DataModule, Module, Trainer
from loopwright.loggers import CSVLogger, Logger, TensorBoardLogger
from tests.framework.models import Evaluated, Linear, data, loader, quiet, weights


class Watch(Callback):
    """Notes ``read(trainer)`` at each hook named."""

    def __init__(self, read: Any, *hooks: str) -> None:
        self.found: list[tuple[str, Any]] = []
        for hook in hooks:
            setattr(
                self,
                hook,
                lambda trainer, *_, hook=hook: self.found.append((hook, read(trainer))),
            )

    def values(self, hook: str) -> list[Any]:
        return [value for name, value in self.found if name == hook]


class Rows(Logger):
    """Keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class Data(DataModule):
    """Counts how often each loader is made."""

    def __init__(self, batches: int = 4) -> None:
        super().__init__()
        self.batches = batches
        self.made: list[str] = []

    def make(self, name: str) -> DataLoader[Any]:
        self.made.append(name)
        return loader(self.batches)

    def train_dataloader(self) -> Any:
        return self.make("train")

    def val_dataloader(self) -> Any:
        return self.make("val")

    def test_dataloader(self) -> Any:
        return self.make("test")

    def predict_dataloader(self) -> Any:
        return self.make("predict")


class Stream(IterableDataset[Any]):
    """Six samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data(6))


# -- what can be read -----------------------------------------------------------------------------------------------


def test_attributes_before_a_run(tmp_path: Path) -> None:
    """Everything is readable at once, so that other packages can look."""
    trainer = quiet(default_root_dir=tmp_path)
    assert (trainer.current_epoch, trainer.global_step) == (0, 0)
    assert (
        trainer.world_size,
        trainer.global_rank,
        trainer.local_rank,
        trainer.is_global_zero,
    ) == (1, 0, 0, True)
    assert trainer.num_training_batches == float("inf")
    assert (
        trainer.num_val_batches
        == trainer.num_test_batches
        == trainer.num_predict_batches
        == []
    )
    assert not any(
        (trainer.training, trainer.validating, trainer.testing, trainer.predicting, trainer.sanity_checking,
         trainer.should_stop, trainer.interrupted)
    )  # fmt: skip
    assert (
        trainer.callback_metrics
        == trainer.logged_metrics
        == trainer.progress_bar_metrics
        == {}
    )
    assert (
        trainer.optimizers
        == trainer.lr_scheduler_configs
        == trainer.loggers
        == trainer.callbacks
        == []
    )
    assert (
        trainer.train_dataloader
        is trainer.val_dataloaders
        is trainer.test_dataloaders
        is None
    )
    assert (
        trainer.predict_dataloaders
        is trainer.datamodule
        is trainer.ckpt_path
        is trainer.logger
        is None
    )
    assert trainer.module is trainer.model is trainer.lightning_module is None
    assert (
        trainer.checkpoint_callback
        is trainer.early_stopping_callback
        is trainer.progress_bar_callback
        is None
    )
    assert (trainer.strategy.name, trainer.precision, trainer.state.status) == (
        "single",
        "32-true",
        "initializing",
    )
    assert trainer.default_root_dir == trainer.log_dir == str(tmp_path)


def test_default_root_dir_is_the_working_directory() -> None:
    """Unless it is given."""
    assert quiet().default_root_dir == str(Path.cwd())


def test_attributes_inside_fit() -> None:
    """Module, data and optimizer, from the moment at which they are there."""
    module, datamodule = Evaluated(), Data()

    def read(trainer: Trainer) -> Any:
        assert trainer.module is trainer.model is trainer.lightning_module is module
        assert module.trainer is datamodule.trainer is trainer
        assert trainer.datamodule is datamodule
        return {
            "optimizers": [type(optimizer) for optimizer in trainer.optimizers],
            "train": trainer.num_training_batches,
            "val": trainer.num_val_batches,
            "loader": trainer.train_dataloader is not None,
            "counters": (
                trainer.current_epoch,
                trainer.global_step,
                module.current_epoch,
                module.global_step,
            ),
            "status": (trainer.state.fn, trainer.state.status),
        }

    hooks = (
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_batch_end",
        "on_train_end",
    )
    watch = Watch(read, *hooks)
    trainer = quiet(watch, limit_val_batches=2)
    trainer.fit(module, datamodule=datamodule)
    status = ("fit", "running")
    sgd = [torch.optim.SGD]
    whole = {
        "optimizers": sgd,
        "train": 4,
        "val": [2],
        "loader": True,
        "status": status,
    }
    assert watch.values("setup")[0]["status"] == status
    assert watch.values("on_fit_start")[0]["optimizers"] == sgd
    assert watch.values("on_train_start") == [{**whole, "counters": (0, 0, 0, 0)}]
    assert [found["counters"] for found in watch.values("on_train_batch_end")] == [
        (0, i, 0, i) for i in (1, 2, 3, 4)
    ]
    assert watch.values("on_train_end") == [{**whole, "counters": (1, 4, 1, 4)}]
    assert isinstance(trainer.train_dataloader, DataLoader)
    assert isinstance(trainer.val_dataloaders, DataLoader)
    assert (trainer.state.fn, trainer.state.status, trainer.state.stage) == (
        "fit",
        "finished",
        None,
    )


def test_val_dataloaders_of_several() -> None:
    """One is given as it is, several as a list: the user's own objects."""
    trainer, given = quiet(), [loader(2), loader(1)]
    trainer.fit(Evaluated(), loader(), given)
    assert len(trainer.val_dataloaders) == 2
    assert all(
        mine is theirs
        for mine, theirs in zip(trainer.val_dataloaders, given, strict=True)
    )
    assert trainer.num_val_batches == [2, 1]


FLAGS = ("sanity_checking", "training", "validating", "testing", "predicting")


def flags(trainer: Trainer) -> list[str]:
    return [name for name in FLAGS if getattr(trainer, name)]


def test_stage_flags() -> None:
    """At each moment, exactly the right one is set; afterwards, none."""
    hooks = (
        "on_validation_batch_start",
        "on_train_batch_start",
        "on_test_batch_start",
        "on_predict_batch_start",
    )
    watch = Watch(flags, *hooks, "on_train_epoch_end", "on_sanity_check_start")
    trainer, datamodule, module = (
        quiet(watch, num_sanity_val_steps=1),
        Data(1),
        Evaluated(),
    )
    trainer.fit(module, datamodule=datamodule)
    assert watch.found == [
        ("on_sanity_check_start", ["sanity_checking"]),
        ("on_validation_batch_start", ["sanity_checking"]),
        ("on_train_batch_start", ["training"]),
        ("on_validation_batch_start", ["validating"]),
        ("on_train_epoch_end", ["training"]),
    ]
    assert flags(trainer) == []
    for fn, flag in (
        ("validate", "validating"),
        ("test", "testing"),
        ("predict", "predicting"),
    ):
        watch.found.clear()
        getattr(trainer, fn)(module, datamodule=datamodule)
        assert [value for _, value in watch.found] == [[flag]]
        assert flags(trainer) == []


def test_metrics_inside_fit() -> None:
    """callback_, logged_ and progress_bar_metrics show what was logged where."""

    class Logs(Evaluated):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", float(batch_idx), prog_bar=True)
            self.log("b", 2 * batch_idx, logger=False)
            return super().training_step(batch, batch_idx)

    def read(trainer: Trainer) -> Any:
        floats = [
            {k: float(v) for k, v in m.items()}
            for m in (trainer.callback_metrics, trainer.logged_metrics)
        ]
        return *floats, trainer.progress_bar_metrics

    watch = Watch(read, "on_train_batch_end", "on_train_end")
    trainer = quiet(watch)
    trainer.fit(Logs(), loader(2), loader(1))
    assert watch.values("on_train_batch_end") == [
        ({"a": 0.0, "b": 0.0}, {"a": 0.0}, {"a": 0.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}, {"a": 1.0}),
    ]
    ((callback, logged, bar),) = watch.values("on_train_end")
    assert set(callback) == {"a", "b", "val_loss"}
    assert set(logged) == {"a", "val_loss"}
    assert bar == {"a": 1.0}
    assert all(
        isinstance(value, Tensor) and value.dim() == 0
        for value in trainer.callback_metrics.values()
    )


def test_callbacks_by_kind() -> None:
    """The first ModelCheckpoint, EarlyStopping and progress bar can be found."""
    checkpoint, stopping = ModelCheckpoint("saved"), EarlyStopping("val_loss")
    trainer = Trainer(callbacks=[checkpoint, stopping], logger=False)
    assert trainer.checkpoint_callback is checkpoint
    assert trainer.checkpoint_callbacks == [checkpoint]
    assert trainer.early_stopping_callback is stopping
    assert trainer.early_stopping_callbacks == [stopping]
    assert isinstance(trainer.progress_bar_callback, ProgressBar)


def test_default_callbacks() -> None:
    """A checkpoint callback, a bar and a summary, unless switched off."""
    kinds = (ModelCheckpoint, ProgressBar, ModelSummary)
    made = Trainer(logger=False).callbacks
    assert all(any(isinstance(callback, kind) for callback in made) for kind in kinds)
    off: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    assert Trainer(logger=False, **off).callbacks == []


def test_loggers(tmp_path: Path) -> None:
    """None means TensorBoard; several are a list; log_dir is the first one's."""
    assert isinstance(
        quiet(logger=None, default_root_dir=tmp_path).logger, TensorBoardLogger
    )
    first, second = CSVLogger(tmp_path), Rows()
    trainer = quiet(logger=[first, second])
    assert trainer.loggers == [first, second]
    assert trainer.logger is first
    assert trainer.log_dir == first.log_dir
    module = Linear()
    trainer.fit(module, loader())
    assert module.logger is first
    assert module.loggers == [first, second]


def test_a_hyperparameter_of_module_and_data_with_two_values_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loggers can have one of them only."""

    class Batched(Linear):
        def __init__(self, batch_size: int = 3, depth: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Batches(DataModule):
        def __init__(self, batch_size: int = 4, depth: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader()

    trainer = quiet(max_steps=1, logger=CSVLogger(tmp_path))
    trainer.fit(Batched(), datamodule=Batches())
    [told] = [line for line in caplog.messages if "same name" in line]
    assert "batch_size of the data, 4; the module's, 3" in told
    caplog.clear()
    trainer.fit(Batched(4), datamodule=Batches())
    quiet(max_steps=1).fit(Batched(), datamodule=Batches())
    assert "same name" not in caplog.text


def test_ckpt_path_of_a_resumed_run() -> None:
    """It names the checkpoint, and is None in a run without."""
    trainer, module = quiet(), Evaluated()
    trainer.fit(module, loader())
    trainer.save_checkpoint("a.ckpt")
    trainer.test(module, loader(), ckpt_path="a.ckpt", verbose=False)
    assert trainer.ckpt_path == "a.ckpt"
    trainer.test(module, loader(), verbose=False)
    assert trainer.ckpt_path is None


@pytest.mark.parametrize(
    ("error", "interrupted"), [(KeyboardInterrupt, True), (RuntimeError, False)]
)
def test_state_after_an_exception(
    error: type[BaseException], interrupted: bool
) -> None:
    """``interrupted`` tells Ctrl-C from a failure; the Trainer can run again."""

    class Raises(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            raise error

    trainer = quiet(Raises())
    with pytest.raises(error):
        trainer.fit(Linear(), loader())
    assert trainer.interrupted is interrupted
    assert trainer.state.status == ("interrupted" if interrupted else "failed")
    assert flags(trainer) == []
    trainer.callbacks.clear()
    trainer.fit(Linear(), loader())
    assert not trainer.interrupted


class Estimates(Linear):
    """Reads the length of the run where schedulers are made."""

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": -1, "max_steps": 7}, 7),
    ],
)
def test_estimated_stepping_batches(arguments: dict[str, Any], steps: int) -> None:
    """The number of optimizer steps of the run, known in configure_optimizers, and true."""
    module, datamodule = Estimates(), Data()
    trainer = quiet(**arguments)
    trainer.fit(module, datamodule=datamodule)
    assert module.estimated == trainer.global_step == steps
    assert datamodule.made == ["train"]


def test_estimate_without_end_or_length() -> None:
    """Infinite if nothing tells."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    for train, arguments in (
        (loader(), {"max_epochs": -1}),
        (DataLoader(Stream()), {"max_epochs": 2}),
    ):
        module = Estimates()
        quiet(Stops(), **arguments).fit(module, train)
        assert module.estimated == float("inf")


def test_estimate_before_a_run() -> None:
    """Says where it is known."""
    with pytest.raises(RuntimeError, match="is known inside fit"):
        _ = quiet().estimated_stepping_batches


# -- how long -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "epochs", "steps"),
    [
        ({"max_epochs": 2}, 2, 8),
        ({"max_steps": 6, "max_epochs": None}, 1, 6),
        ({"max_steps": 8, "max_epochs": None}, 2, 8),
        ({"max_steps": 100, "max_epochs": 1}, 1, 4),
        ({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2}, 1, 3),
    ],
)
def test_max_epochs_and_steps(
    arguments: dict[str, Any], epochs: int, steps: int
) -> None:
    """Whichever is first ends the run; steps are optimizer steps."""
    trainer = quiet(**arguments)
    trainer.fit(Linear(), loader())
    assert (trainer.current_epoch, trainer.global_step) == (epochs, steps)


def test_default_max_epochs() -> None:
    """1000, or no limit where another limit is given."""
    assert quiet(max_epochs=None).max_epochs == 1000
    assert quiet(max_epochs=None, max_steps=3).max_epochs == -1
    assert quiet(max_epochs=None, max_time="00:00:01:00").max_epochs == -1


class StopsAtOnce(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, 1),
        ({"min_epochs": 2}, 8),
        ({"min_steps": 6}, 6),
        ({"min_epochs": 1, "min_steps": 2}, 4),
    ],
)
def test_min_epochs_and_steps(arguments: dict[str, Any], steps: int) -> None:
    """Whoever asks to stop, so much is trained."""
    trainer = quiet(StopsAtOnce(), max_epochs=5, **arguments)
    trainer.fit(Linear(), loader())
    assert trainer.global_step == steps


@pytest.mark.parametrize(
    "max_time", [timedelta(microseconds=1), {"seconds": 0}, "00:00:00:00"]
)
def test_max_time(max_time: Any) -> None:
    """A run whose time is over ends, without any other limit."""
    trainer = quiet(max_epochs=None, max_time=max_time)
    assert any(isinstance(callback, Timer) for callback in trainer.callbacks)
    trainer.fit(Linear(), loader())
    assert trainer.global_step <= 4
    assert trainer.should_stop


def test_a_second_fit_goes_on() -> None:
    """Two epochs in two calls are two epochs in one: the same shuffled batches, the same weights."""
    whole, parts = Linear(), Linear()
    parts.load_state_dict(whole.state_dict())
    torch.manual_seed(5)
    quiet(max_epochs=2).fit(whole, loader(shuffle=True))
    torch.manual_seed(5)
    trainer, shuffled = quiet(), loader(shuffle=True)
    trainer.fit(parts, shuffled)
    trainer.fit(parts, shuffled)  # nothing is left to do
    assert trainer.global_step == 4
    trainer.max_epochs = 2
    trainer.fit(parts, shuffled)
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)
    assert torch.equal(torch.stack(whole.seen), torch.stack(parts.seen))
    assert all(map(torch.equal, weights(whole), weights(parts)))


def test_a_fit_after_should_stop_goes_on() -> None:
    """A stop in mid-epoch is not for ever: the next call finishes the epoch."""
    trainer, module = quiet(StopsAtOnce(), max_epochs=1), Linear()
    trainer.fit(module, loader())
    assert (trainer.current_epoch, trainer.global_step) == (0, 1)
    trainer.callbacks.clear()
    trainer.fit(module, loader())
    assert (trainer.current_epoch, trainer.global_step) == (1, 4)
    assert torch.equal(torch.cat(module.seen), data().tensors[0])


# -- how many batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "batches"),
    [(None, 4), (3, 3), (100, 4), (0.5, 2), (1.0, 4), (0, 0), (0.0, 0)],
)
@pytest.mark.parametrize("fn", ["train", "val", "test", "predict"])
def test_limits(fn: str, limit: int | float | None, batches: int) -> None:
    """A number of batches, a fraction, or none at all, for each kind of loader."""
    hook = {"val": "on_validation_batch_end"}.get(fn, f"on_{fn}_batch_end")
    watch = Watch(lambda _: None, hook)
    trainer, module = quiet(watch, **{f"limit_{fn}_batches": limit}), Evaluated()
    if fn in ("train", "val"):
        trainer.fit(module, loader(), loader())
    else:
        getattr(trainer, fn)(module, loader())
    assert len(watch.found) == batches
    count = (
        trainer.num_training_batches
        if fn == "train"
        else getattr(trainer, f"num_{fn}_batches")
    )
    assert count == (batches if fn == "train" else [batches] if batches else [])


def test_limit_of_a_loader_without_length() -> None:
    """A number works; its fraction is not known."""
    module = Linear()
    quiet(limit_train_batches=2).fit(module, DataLoader(Stream(), batch_size=2))
    assert len(module.seen) == 2
    with pytest.raises(
        ValueError, match=r"limit_train_batches=0.5.*pass a number of batches"
    ):
        quiet(limit_train_batches=0.5).fit(Linear(), DataLoader(Stream(), batch_size=2))


@pytest.mark.parametrize("overfit", [2, 0.5])
def test_overfit_batches(overfit: int | float) -> None:
    """The same batches in the same order in each epoch, though the loader shuffles; validation as many."""
    watch = Watch(lambda _: None, "on_validation_batch_end")
    module = Evaluated()
    quiet(watch, overfit_batches=overfit, max_epochs=2).fit(
        module, loader(shuffle=True), loader()
    )
    assert torch.equal(torch.cat(module.seen), data().tensors[0][:4].repeat(2, 1))
    assert len(watch.found) == 4


@pytest.mark.parametrize("count", [True, 3])
def test_fast_dev_run(count: bool | int) -> None:
    """So many batches of everything, one epoch; no logger, no checkpoint, no sanity check."""
    hooks = ("on_train_batch_end", "on_validation_batch_end", "on_sanity_check_start")
    watch = Watch(lambda _: None, *hooks)
    trainer = Trainer(
        fast_dev_run=count,
        callbacks=[watch, ModelCheckpoint("saved")],
        max_epochs=10,
        enable_progress_bar=False,
    )
    trainer.fit(Evaluated(), loader(), loader())
    assert [len(watch.values(hook)) for hook in hooks] == [int(count), int(count), 0]
    assert trainer.global_step == int(count)
    assert not Path("saved").exists()


def test_the_logger_of_a_fast_dev_run() -> None:
    """Takes every call and does nothing; without a logger, there is none there either."""

    class Draws(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.logger is not None
            figure = self.logger.experiment.figure("x").add(1)[0]
            self.logger.experiment.add_scalar("x", figure, batch_idx)
            self.logger.log_metrics({"x": 1.0}, step=3)
            return super().training_step(batch, batch_idx)

    for logger in (None, True, CSVLogger("logs")):
        trainer = quiet(fast_dev_run=2, logger=logger)
        trainer.fit(Draws(), loader())
        assert trainer.log_dir == str(Path.cwd())
    assert list(Path.cwd().iterdir()) == []
    assert quiet(fast_dev_run=True).loggers == []


def test_words_for_what_a_trainer_does() -> None:
    """Are texts, and items of enums with name and value."""
    watch = Watch(
        lambda trainer: (
            trainer.state.fn.value,
            trainer.state.fn.name,
            f"{trainer.state.stage}",
            str(trainer.state.status),
            trainer.state.stage == "train",
            trainer.state.finished,
            trainer.evaluating,
        ),
        "on_train_batch_end",
        "on_validation_start",
    )
    trainer = quiet(watch)
    assert (trainer.state.fn, trainer.state.status.value) == (None, "initializing")
    trainer.fit(Evaluated(), loader(1), loader(1))
    assert watch.found == [
        (
            "on_train_batch_end",
            ("fit", "FITTING", "train", "running", True, False, False),
        ),
        (
            "on_validation_start",
            ("fit", "FITTING", "validate", "running", False, False, True),
        ),
    ]
    assert trainer.state.finished
    assert trainer.state.status == "finished"
    twin = pickle.loads(pickle.dumps(trainer.state))
    assert twin == trainer.state
    assert twin.fn is trainer.state.fn


def test_devices() -> None:
    """Of this machine, as numbers; and arguments that can be read."""
    trainer = quiet(devices=1, max_time={"seconds": 9})
    assert (trainer.num_devices, trainer.device_ids, trainer.node_rank) == (1, [0], 0)
    assert quiet(devices=3).device_ids == [0, 1, 2]
    assert trainer.max_time == {"seconds": 9}


def test_a_profiler_as_an_object() -> None:
    """Takes part as a callback."""
    profiler = SimpleProfiler()
    trainer = quiet(profiler=profiler)
    trainer.fit(Linear(), loader(), None)
    assert trainer.profiler is profiler
    assert profiler.counts["forward"] == 4
    for wrong in ("quick", 3, SimpleProfiler):
        with pytest.raises((TypeError, ValueError), match="profiler must be"):
            quiet(profiler=wrong)


class Gaps(Linear):
    """Half of its batches are None, as a collate function may give them."""

    def train_dataloader(self) -> Any:
        batches: Any = loader()

        def collate(samples: list[Any]) -> Any:
            is_odd = round(float(samples[0][0][0]) * 10) % 4
            return None if is_odd else batches.collate_fn(samples)

        return DataLoader(data(8), batch_size=2, collate_fn=collate)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_batches_that_are_none(
    accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Are left out, which is said once; a window steps on what it has."""
    watch = Watch(
        lambda trainer: trainer.batch_idx, "on_train_batch_start", "on_train_batch_end"
    )
    module = Gaps()
    trainer = quiet(watch, accumulate_grad_batches=accumulate, max_epochs=2)
    trainer.fit(module)
    assert watch.values("on_train_batch_start") == [0, 2] * 2
    assert watch.values("on_train_batch_end") == [1, 2, 3, 4] * 2
    assert trainer.global_step == 2 * min(2, 4 // accumulate)
    assert caplog.text.count("The training loader gave None") == 1
    other = Linear()
    other.load_state_dict(Gaps().state_dict())
    nothing = quiet(max_epochs=1)
    before = weights(other)
    nothing.fit(
        other, DataLoader(data(4), batch_size=2, collate_fn=lambda samples: None)
    )
    assert nothing.global_step == 0
    assert all(map(torch.equal, before, weights(other)))


class Forward(Linear):
    """Notes whether its forward is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.compiled.add(torch.compiler.is_compiling())
        return super().forward(x)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def test_a_module_that_comes_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """Is trained as after ``module.compile()``; one without a forward is not compiled, which is said."""
    plain, module = Linear(), Forward()
    plain.load_state_dict(module.state_dict())
    compiled: Any = torch.compile(module, backend="eager")
    trainer = quiet()
    trainer.fit(compiled, loader())
    quiet().fit(plain, loader())
    assert trainer.module is module
    assert module.compiled == {True}
    torch.testing.assert_close(weights(module), weights(plain))
    predictions: Any = trainer.predict(compiled, loader(1))
    torch.testing.assert_close(predictions[0], plain(data(2).tensors[0]).detach())

    class Bare(Linear):
        forward = nn.Module.forward

        def loss(self, batch: Any) -> Tensor:
            return self.layer(batch[0]).square().mean()

    bare: Any = torch.compile(Bare(), backend="eager")
    quiet().fit(bare, loader())
    assert "Bare has none, so nothing of it is compiled" in caplog.text


@pytest.mark.parametrize(
    ("steps", "batches"), [(None, 2), (0, 0), (1, 1), (-1, 4), (100, 4)]
)
def test_sanity_check(steps: int | None, batches: int) -> None:
    """So many validation batches before training, none of whose values stay."""
    watch = Watch(lambda trainer: trainer.sanity_checking, "on_validation_batch_end")
    metrics = Watch(lambda trainer: trainer.callback_metrics, "on_train_start")
    quiet(watch, metrics, num_sanity_val_steps=steps).fit(
        Evaluated(), loader(), loader()
    )
    assert watch.values("on_validation_batch_end").count(True) == batches
    assert metrics.values("on_train_start") == [{}]


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        ({}, [4, 8]),
        ({"val_check_interval": 2}, [2, 4, 6, 8]),
        ({"val_check_interval": 3}, [3, 7]),
        ({"val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"check_val_every_n_epoch": 2}, [8]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6]),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, [6]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 2}, [6, 8]),
    ],
)
def test_when_validation_runs(arguments: dict[str, Any], after: list[int]) -> None:
    """After which steps, of two epochs of four."""
    watch = Watch(lambda trainer: trainer.global_step, "on_validation_start")
    quiet(watch, max_epochs=2, **arguments).fit(Evaluated(), loader(), loader(1))
    assert watch.values("on_validation_start") == after


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6]), (0, []), (None, [])],
)
def test_log_every_n_steps(every: int | None, steps: list[int]) -> None:
    """Step values reach the loggers after so many optimizer steps; 0 never; the default is 50."""

    class Logs(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    rows = Rows()
    trainer = quiet(logger=rows, log_every_n_steps=every, max_epochs=2)
    trainer.fit(Logs(), loader())
    assert [step for step, _ in rows.rows] == steps
    assert [row["epoch"] for _, row in rows.rows] == [(step - 1) // 4 for step in steps]


@pytest.mark.parametrize(("every", "made"), [(0, 1), (1, 4), (2, 2)])
def test_reload_dataloaders(every: int, made: int) -> None:
    """The loaders are made again every so many epochs."""
    datamodule = Data()
    quiet(reload_dataloaders_every_n_epochs=every, max_epochs=4).fit(
        Evaluated(), datamodule=datamodule
    )
    assert (datamodule.made.count("train"), datamodule.made.count("val")) == (
        made,
        made,
    )


# -- the other arguments --------------------------------------------------------------------------------------------


def test_barebones() -> None:
    """Nothing but the loop: ``log`` does nothing either."""
    watch = Watch(lambda trainer: trainer.sanity_checking, "on_validation_start")
    trainer = Trainer(barebones=True, max_epochs=1, callbacks=watch)
    module = Evaluated()
    trainer.fit(module, loader(), loader())
    assert trainer.callbacks == [watch]
    assert trainer.loggers == []
    assert watch.values("on_validation_start") == [False]
    assert trainer.callback_metrics == {}
    assert list(Path.cwd().iterdir()) == []


def test_detect_anomaly() -> None:
    """A loss that is not finite ends the run at its batch; autograd's detection is on, and off again afterwards."""

    class Breaks(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.is_anomaly_enabled()
            return super().training_step(batch, batch_idx) * (
                float("nan") if batch_idx == 2 else 1
            )

    with pytest.raises(RuntimeError, match="nan at epoch 0, batch 2, global step 2"):
        quiet(detect_anomaly=True).fit(Breaks(), loader())
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("deterministic", [True, "warn"])
def test_deterministic(deterministic: bool | str) -> None:
    """Sets torch's flag."""
    watch = Watch(
        lambda _: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "on_train_start",
    )
    try:
        quiet(watch, deterministic=deterministic).fit(Linear(), loader())
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.values("on_train_start") == [(True, deterministic == "warn")]


def test_profiler(capsys: pytest.CaptureFixture[str]) -> None:
    """A name makes the callback, which reports at the end."""
    trainer = quiet(profiler="simple")
    assert any(isinstance(callback, SimpleProfiler) for callback in trainer.callbacks)
    trainer.fit(Linear(), loader())
    captured = capsys.readouterr()
    assert "backward" in captured.out + captured.err


def test_gradient_clipping() -> None:
    """By norm and by value, as torch does it."""
    for algorithm, clip in (
        ("norm", nn.utils.clip_grad_norm_),
        ("value", nn.utils.clip_grad_value_),
    ):
        module, raw = Linear(), Linear()
        raw.load_state_dict(module.state_dict())
        quiet(gradient_clip_val=0.01, gradient_clip_algorithm=algorithm).fit(
            module, loader(1)
        )
        raw.loss(next(iter(loader(1)))).backward()
        clip(raw.parameters(), 0.01)
        torch.optim.SGD(raw.parameters(), lr=0.1).step()
        assert all(map(torch.equal, weights(module), weights(raw)))


def test_compile() -> None:
    """The compiled code is what runs, and the checkpoint's keys stay as they are without."""
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh()

    class Nested(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.layer(x)

    module, plain = Nested(), Nested()
    plain.load_state_dict(module.state_dict())
    keys = list(module.state_dict())
    trainer = quiet(compile={"backend": backend})
    trainer.fit(module, loader())
    torch._dynamo.reset()
    quiet().fit(plain, loader())
    assert (
        len(runs) == 4 + 2 * 4
    )  # four batches; the torch layers as one, each block by itself
    assert list(module.state_dict()) == keys == list(plain.state_dict())
    for mine, theirs in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    trainer.save_checkpoint("compiled.ckpt")
    assert list(Nested.load_from_checkpoint("compiled.ckpt").state_dict()) == keys


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode(inference_mode: bool) -> None:
    """Outside of fit only: what a module keeps of a validation inside fit may meet autograd later."""
    watch = Watch(
        lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
        "on_validation_batch_end",
    )
    trainer, module = quiet(watch, inference_mode=inference_mode), Evaluated()
    trainer.fit(module, loader(1), loader(1))
    trainer.validate(module, loader(1), verbose=False)
    assert watch.values("on_validation_batch_end") == [
        (False, False),
        (inference_mode, False),
    ]


def test_results_of_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """validate and test give, and print, a dict for each loader; predict what the steps returned."""
    trainer, module = quiet(), Evaluated()
    results = trainer.validate(module, [loader(2), loader(1)])
    losses = [
        [module.loss(batch).item() for batch in made] for made in (loader(2), loader(1))
    ]
    expected = [
        {f"val_loss/dataloader_idx_{i}": pytest.approx(sum(values) / len(values))}
        for i, values in enumerate(losses)
    ]
    assert results == expected
    assert "val_loss" in capsys.readouterr().out
    assert set(trainer.test(module, loader(1), verbose=False)[0]) == {"test_loss"}
    assert capsys.readouterr().out == ""

    with torch.no_grad():
        outputs = [module(batch[0]) for batch in loader(2)]
    predicted = trainer.predict(module, loader(2))
    assert predicted is not None
    assert all(map(torch.equal, predicted, outputs))
    several = trainer.predict(module, [loader(2), loader(1)])
    assert several is not None
    assert [len(part) for part in several] == [2, 1]
    assert trainer.predict(module, loader(2), return_predictions=False) is None


def test_modes_of_submodules_stay() -> None:
    """A part that the user put into evaluation mode stays so through validation."""

    class Frozen(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Dropout()
            self.frozen.eval()

    module = Frozen()
    watch = Watch(
        lambda _: (module.training, module.frozen.training),
        "on_validation_start",
        "on_train_batch_start",
    )
    quiet(watch, max_epochs=2).fit(module, loader(1), loader(1))
    assert watch.values("on_train_batch_start") == [(True, False)] * 2
    assert watch.values("on_validation_start") == [(False, False)] * 2
    assert (module.training, module.frozen.training) == (True, False)


# -- what people build on it ----------------------------------------------------------------------------------------


class MyTrainer(Trainer):
    """A Trainer with an argument of its own."""

    def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


def test_subclasses_and_further_attributes() -> None:
    """Trainer, Module and DataModule take attributes and override public methods such as log."""

    class Mine(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.logged: list[str] = []

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            self.logged.append(name)
            super().log(name, *args, **kwargs)

    quiet_arguments = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False
    }  # fmt: skip
    trainer, module, datamodule = (
        MyTrainer(note="mine", max_epochs=1, **quiet_arguments),
        Mine(),
        Data(1),
    )
    trainer.extra = module.extra = datamodule.extra = "more"  # type: ignore[attr-defined] # any name may be added
    trainer.fit(module, datamodule=datamodule)
    assert trainer.note == "mine"
    assert module.logged == ["val_loss", "val_loss"]  # the sanity check's, too
    assert [vars(each)["extra"] for each in (trainer, module, datamodule)] == [
        "more"
    ] * 3


def test_deepcopy_before_and_after_a_run() -> None:
    """A copy runs by itself, and the original goes on."""
    trainer, module, datamodule = quiet(ModelCheckpoint("saved")), Evaluated(), Data()
    early = copy.deepcopy(trainer)
    early.fit(copy.deepcopy(module), datamodule=datamodule)
    assert (early.global_step, trainer.global_step) == (4, 0)
    trainer.fit(module, datamodule=datamodule)

    late, twin = copy.deepcopy(trainer), copy.deepcopy(module)
    late.max_epochs = 2
    late.fit(twin, datamodule=copy.deepcopy(datamodule))
    assert (late.global_step, trainer.global_step) == (8, 4)
    assert not any(map(torch.equal, weights(module), weights(twin)))
    assert module.trainer is trainer
    assert twin.trainer is late
    trainer.max_epochs = 3
    trainer.fit(module, datamodule=datamodule)
    assert trainer.global_step == 12


def test_a_fitted_module_can_be_pickled() -> None:
    """Without its Trainer: as it goes to other processes."""
    module = Evaluated()
    quiet().fit(module, loader())
    twin = pickle.loads(pickle.dumps(module))
    assert all(map(torch.equal, weights(module), weights(twin)))
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = twin.trainer
    quiet().fit(twin, loader())


def test_settable_attributes() -> None:
    """max_epochs, should_stop, logger and optimizers take new values."""

    class Replaces(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.0)]

    trainer, module, rows = quiet(Replaces()), Linear(), Rows()
    before = weights(module)
    trainer.logger = rows
    assert trainer.loggers == [rows]
    trainer.fit(module, loader())
    assert all(map(torch.equal, before, weights(module)))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        (lambda p: [], "began with 1 and cannot go on with 0"),
        (lambda p: torch.optim.SGD(p, 0.1), "must be a list of optimizers; got SGD"),
        (
            lambda p: [torch.optim.SGD(p, 0.1)] * 2,
            "began with 1 and cannot go on with 2",
        ),
        (lambda p: [None], r"must be a list of optimizers; got \[None\]"),
        (lambda p: [torch.optim.LBFGS(p)], "LBFGS cannot take the place of a SGD"),
    ],
)
def test_optimizers_that_cannot_be_set(optimizers: Any, words: str) -> None:
    """Are refused as those of configure_optimizers are, and the old ones stay."""

    class Sets(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
            before = trainer.optimizers
            with pytest.raises((TypeError, ValueError), match=words):
                trainer.optimizers = optimizers(list(pl_module.parameters()))
            assert trainer.optimizers == before

    trainer = quiet(Sets())
    trainer.fit(Linear(), loader())
    assert trainer.global_step == 4


class Fails(Rows):
    """Cannot write its last rows."""

    def finalize(self, status: str) -> None:
        raise OSError(28, "No space left on device")


class Ends(Rows):
    status = ""

    def finalize(self, status: str) -> None:
        self.status = status


def test_a_logger_that_cannot_finish(caplog: pytest.LogCaptureFixture) -> None:
    """Is told of; the others finish, the run has come to its end, and its results are there."""
    ends = Ends()
    watch = Watch(lambda trainer: trainer.state.status, "teardown", "on_exception")
    trainer = quiet(watch, logger=[Fails(), ends])
    assert trainer.test(Evaluated(), loader(), verbose=False)[0]["test_loss"] > 0
    assert [name for name, _ in watch.found] == ["teardown"]
    assert trainer.state.finished
    assert ends.status == "success"
    assert "Fails could not finish (success)" in caplog.text
    assert "No space left on device" in caplog.text

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    module: Any = Linear()
    module.training_step = fail
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert ends.status == "failed"


def test_configure_callbacks_of_the_module() -> None:
    """They join for the run, replace those of their type, and are gone afterwards."""

    class Own(Callback):
        def __init__(self, name: str) -> None:
            self.name = name
            self.ran = False

        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            self.ran = True
            assert [c.name for c in trainer.callbacks if isinstance(c, Own)] == [
                "module"
            ]

    class Brings(Linear):
        def configure_callbacks(self) -> Callback:
            return own

    own, given = Own("module"), Own("trainer")
    trainer = quiet(given)
    trainer.fit(Brings(), loader())
    assert (own.ran, given.ran) == (True, False)
    assert trainer.callbacks == [
        own
    ]  # where its results can be read, and a test finds the best checkpoint


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Trainer.print and Module.print write in the main process."""
    trainer, module = quiet(), Linear()
    trainer.print("from the trainer")
    module.print("from the module")
    assert capsys.readouterr().out == "from the trainer\nfrom the module\n"


def test_what_a_modules_own_checkpoint_callback_found_is_kept() -> None:
    """After fit its best checkpoint can be read and tested; a test of another checkpoint does not set it back."""

    class Brings(Evaluated):
        def configure_callbacks(self) -> Callback:
            return ModelCheckpoint("kept", save_top_k=-1)

    trainer = quiet(max_epochs=2)
    trainer.fit(Brings(), loader(), loader())
    checkpoints: Any = trainer.checkpoint_callback
    best = checkpoints.best_model_path
    assert best.endswith("epoch=1-step=8.ckpt")
    trainer.test(
        dataloaders=loader(),
        ckpt_path=best.replace("epoch=1-step=8", "epoch=0-step=4"),
        verbose=False,
    )
    checkpoints = trainer.checkpoint_callback
    assert checkpoints.best_model_path == best


def test_a_test_without_a_model_takes_no_other_modules_checkpoint() -> None:
    """After a validation of another module, that one is tested as it is."""
    trainer, other = quiet(ModelCheckpoint("kept")), Evaluated()
    trainer.fit(Evaluated(), loader(), loader())
    before = other.layer.weight.clone()
    trainer.validate(other, loader(), verbose=False)
    trainer.test(dataloaders=loader(), verbose=False)
    assert trainer.ckpt_path is None
    assert torch.equal(other.layer.weight, before)


def test_two_datamodules_are_refused() -> None:
    with pytest.raises(ValueError, match="loaders or a datamodule, not both"):
        quiet().fit(Linear(), DataModule(), datamodule=DataModule())


def test_a_raising_exception_hook_does_not_hide_the_error() -> None:
    """What ended the run is raised, and loggers are closed."""

    class Raises(Callback):
        def on_exception(
            self, trainer: Trainer, module: Module, exception: BaseException
        ) -> None:
            raise KeyError("another")

    module = Linear()
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        quiet(Raises()).fit(module, loader())


class Scheduled(Evaluated):
    """At the top level, where pickle finds it; with a schedule that pickle does not take."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        ]


def test_a_fitted_trainer_can_be_pickled(tmp_path: Path) -> None:
    """With all that it has by default; copies go on as the original does, with moments and schedule, bit for bit."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Timer(), EarlyStopping("val_loss")],
        default_root_dir=tmp_path,
    )
    trainer.fit(Scheduled(), loader(), loader())
    ends = []
    for one in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer), trainer):
        assert one.state.status == "finished"
        assert one.callback_metrics == trainer.callback_metrics
        one.max_epochs = 3
        one.fit(one.module, loader(), loader())
        assert one.global_step == 12
        ends.append(weights(one.module))
    assert all(map(torch.equal, ends[0], ends[2]))
    assert all(map(torch.equal, ends[1], ends[2]))


class Encoding:
    """Moves itself, as a tokenizer's encoding does."""

    def __init__(self, device: str) -> None:
        self.device = device

    def to(self, device: Any) -> Encoding:
        return Encoding(str(device))


class Pair(NamedTuple):
    first: Any
    others: Any


@dataclass
class Boxes:
    corners: Any
    label: str


@pytest.mark.gpu
def test_predictions_do_not_fill_the_device() -> None:
    """What each batch gives goes to the CPU before the next."""

    class Big(Evaluated):
        def predict_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> Any:
            return {"x": torch.zeros(2**20, device=self.device)}

    found = quiet(accelerator="gpu", devices=1).predict(Big(), loader(16))
    assert found is not None
    assert {part["x"].device.type for part in found} == {"cpu"}
    assert torch.cuda.max_memory_allocated() < 8 * 2**22


def test_predictions_are_on_the_cpu() -> None:
    """In containers of any kind."""

    class Nested(Evaluated):
        def predict_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> Any:
            far = Encoding("far")
            return {
                "list": [far, (far, 3)],
                "pair": Pair(far, {"deep": far}),
                "boxes": Boxes(far, "x"),
                "none": None,
            }

    found = quiet().predict(Nested(), loader(1))
    assert found is not None
    (only,) = found
    moved = [
        only["list"][0],
        only["list"][1][0],
        only["pair"].first,
        only["pair"].others["deep"],
        only["boxes"].corners,
    ]
    assert [one.device for one in moved] == ["cpu"] * 5
    assert (only["list"][1][1], only["boxes"].label, only["none"]) == (3, "x", None)
    assert (type(only["pair"]), type(only["boxes"])) == (Pair, Boxes)
    assert quiet().predict(Nested(), loader(1), return_predictions=False) is None


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_step_or_hook_that_is_none_is_switched_off(where: str) -> None:
    """For one module, or in a subclass: as if it were not there."""
    module = type("Off", (Evaluated,), {})()
    place = module if where == "instance" else type(module)
    for name in (
        "validation_step",
        "on_train_epoch_end",
        "configure_gradient_clipping",
        "val_dataloader",
        "setup",
    ):
        setattr(place, name, None)
    trainer = quiet(num_sanity_val_steps=2)
    trainer.fit(module, loader())
    assert trainer.global_step == 4
    assert "val_loss" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="has no validation_step"):
        trainer.validate(module, loader())
    module.predict_step = None  # type: ignore[assignment] # as some do to switch it off
    with pytest.raises(ValueError, match="sets predict_step to None"):
        trainer.predict(module, loader())


@pytest.mark.parametrize(
    "arguments", [{"limit_val_batches": 0}, {"limit_val_batches": 0.0}, {}]
)
def test_an_interval_of_validation_that_does_not_run(arguments: dict[str, Any]) -> None:
    """Is no matter: neither one longer than the epoch, nor a fraction of a loader without length."""
    for interval, batches in ((10, loader(3)), (0.25, DataLoader(Stream(), 2))):
        trainer = quiet(val_check_interval=interval, **arguments)
        trainer.fit(Evaluated(), batches, loader() if arguments else None)
        assert trainer.global_step == 3


def test_max_time_beside_timers() -> None:
    """Each keeps its state, and the shorter time ends the run."""
    timer, saved = Timer(), ModelCheckpoint("saved")
    trainer = quiet(timer, saved, max_time={"hours": 1})
    trainer.fit(Linear(), loader())
    assert timer.time_elapsed() > 0
    ended = quiet(Timer({"hours": 9}), max_time={"seconds": 0}, max_epochs=5)
    ended.fit(
        Linear(),
        loader(),
        ckpt_path=getattr(trainer.checkpoint_callback, "last_model_path", None)
        or saved.best_model_path,
    )
    assert ended.current_epoch == 1


def test_datasets_in_a_list_or_dict() -> None:
    """Of training ones, too: they are read together, each shuffled."""
    sets = [data(8), data(6)]
    both = DataModule.from_datasets(sets, {"a": data(4), "b": data(2)}, batch_size=2)
    train, val = both.train_dataloader(), both.val_dataloader()
    assert [len(one) for one in train] == [4, 3]
    assert all(isinstance(one.sampler, RandomSampler) for one in train)
    assert {name: len(one) for name, one in val.items()} == {"a": 2, "b": 1}
    named = DataModule.from_datasets(
        {"x": sets[0], "y": sets[1]}, batch_size=2
    ).train_dataloader()
    assert {name: len(one) for name, one in named.items()} == {"x": 4, "y": 3}
