"""The finders of learning rates and batch sizes: what they find, and that nothing else is changed by looking."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
)
from loopwright.framework import DataModule, Module, Trainer, Tuner
from loopwright.loggers import CSVLogger
from tests.programs import run_program
from tests.strategies.distributed import all_in_processes, quiet

STEPS = 30
# What CPUs say.
NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory"


class Net(Module):
    """Has something of all that a step changes, and counts what it has seen."""

    def __init__(
        self,
        lr: float = 0.05,
        batch_size: int = 4,
        holds: int = 1000,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size, self.holds = lr, batch_size, holds
        norms = [nn.BatchNorm1d(8)] if norm else []
        self.layers = nn.Sequential(
            nn.Linear(4, 8), *norms, nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.steps = 0
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, batch_size=len(batch))
        return loss

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        if len(x) > self.holds - self.global_rank:
            raise RuntimeError(NO_MEMORY)
        loss = (self.layers(x) - x.sum(1, keepdim=True)).square().mean()
        self.steps += 1
        self.losses.append(loss.item())
        return loss

    def on_train_epoch_start(self) -> None:
        self.in_epoch = True

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch).detach()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(min(self.trainer.estimated_stepping_batches, 1000))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def dataset(size: int = 64) -> TensorDataset:
    return TensorDataset(
        torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    )


class Own(Net):
    """Makes its loaders of the batch size."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(norm=False, **arguments)

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), self.batch_size, shuffle=True)

    predict_dataloader = test_dataloader = train_dataloader


def batches(**arguments: Any) -> Any:
    return DataLoader(dataset(), 4, shuffle=True, **arguments)


def fitted(module: Net, trainer: Trainer, data: Any = None) -> Net:
    torch.manual_seed(7)
    trainer.fit(module, data)
    return module


def assert_same(one: Net, other: Net) -> None:
    assert one.losses == other.losses
    states = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, value), (_, expected) in states:
        assert torch.equal(value, expected), name
    assert one.steps == other.steps


def made(kind: type[Net], **arguments: Any) -> Net:
    torch.manual_seed(0)
    return kind(**arguments)


# The learning rate.


@pytest.mark.parametrize(
    "make",
    [
        batches,
        lambda: StatefulDataLoader(dataset(), 4, shuffle=True),
        lambda: {"a": batches(), "b": [torch.ones(2, 4)] * 3},
    ],
    ids=["loader", "stateful", "several"],
)
def test_a_fit_after_a_search_is_the_fit_without_it(make: Any):
    class First(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(
                batch["a"] if isinstance(batch, dict) else batch, batch_idx
            )

    expected = fitted(made(First), quiet(max_epochs=2), make())
    module, data = made(First), make()
    trainer = quiet(max_epochs=2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    callbacks, state = trainer.callbacks, trainer.state.state_dict()
    found = Tuner(trainer).lr_find(module, data, num_training=STEPS, update_attr=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert found is not None
    assert len(found.results["loss"]) == STEPS
    assert trainer.callbacks is callbacks
    assert trainer.state.state_dict() == state
    assert trainer.callback_metrics == {}
    assert module.trainer is trainer
    assert module.steps == 0
    assert not hasattr(module, "in_epoch")
    trainer.fit(module, data)
    assert_same(module, expected)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_callback_trains_as_with_the_rate_that_it_finds(
    tmp_path: Path, precision: str
):
    """Though the optimizer and its schedule are made before it looks; and it resumes."""
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=10)
    finder = LearningRateFinder(num_training_steps=STEPS, min_lr=1e-4)
    arguments: dict[str, Any] = {"max_epochs": 2, "precision": precision}
    trainer = quiet(callbacks=[finder, saves], enable_checkpointing=True, **arguments)
    module = fitted(made(Net), trainer, batches())
    assert finder.optimal_lr is not None
    assert module.lr == module.hparams.lr == finder.optimal_lr.suggestion() != 0.05
    assert_same(module, fitted(made(Net, lr=module.lr), quiet(**arguments), batches()))

    again = LearningRateFinder(num_training_steps=STEPS, min_lr=1e-4)
    resumed = made(Net)
    path = tmp_path / "step=20.ckpt"
    quiet(callbacks=[again], **arguments).fit(resumed, batches(), ckpt_path=path)
    assert resumed.lr == module.lr
    assert resumed.losses == module.losses[20:]
    assert again.optimal_lr is not None
    assert again.optimal_lr.results == finder.optimal_lr.results


def test_a_search_in_later_epochs_changes_the_rate_and_nothing_else(tmp_path: Path):
    class Later(LearningRateFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            return

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    loggers = [CSVLogger(tmp_path / name) for name in "ab"]
    rows = []
    for logger, callback in zip(
        loggers, (Later(update_attr=False), Callback()), strict=True
    ):
        trainer = quiet(
            max_epochs=3, callbacks=[callback], logger=logger, log_every_n_steps=1
        )
        rows.append((fitted(made(Net), trainer, batches()), logger))
    assert_same(rows[0][0], rows[1][0])
    files = [(Path(logger.log_dir) / "metrics.csv").read_text() for _, logger in rows]
    assert files[0] == files[1]
    sets = Later(num_training_steps=STEPS, min_lr=1e-4, max_lr=0.1)
    trainer = quiet(max_epochs=2, callbacks=[sets])
    module = fitted(made(Net), trainer, batches())
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [module.lr]


def test_what_cannot_be_searched_is_said_by_name(caplog: pytest.LogCaptureFixture):
    class Two(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.Adam(self.parameters()),
                torch.optim.SGD(self.parameters(), 0.1),
            ]

    def find(module: Net, data: Any = None, **arguments: Any) -> Any:
        return Tuner(quiet()).lr_find(module, data or batches(), **arguments)

    with pytest.raises(
        ValueError, match=r"single optimizer; there are 2 \(Adam, SGD\)"
    ):
        find(Two())
    with pytest.raises(AttributeError, match="was set to rate, but could not find"):
        find(Net(), attr_name="rate")
    with pytest.raises(ValueError, match="can be read once only"):
        find(Net(), (batch for batch in batches()))
    with pytest.raises(ValueError, match="method='fit' is the only valid"):
        find(Net(), method="test")
    with pytest.raises(ValueError, match="mode must be 'exponential' or"):
        find(Net(), mode="cubic")
    with pytest.raises(ValueError, match="already configured with a `LearningRateF"):
        Tuner(quiet(callbacks=[LearningRateFinder()])).lr_find(Net(), batches())
    with pytest.raises(RuntimeError, match="before an epoch's first batch"):
        quiet().rehearse(1)
    caplog.clear()
    assert Tuner(quiet(fast_dev_run=True)).lr_find(Net(), batches()) is None
    assert "fast_dev_run" in caplog.text
    found = find(Net(), num_training=5, update_attr=False)
    assert found.suggestion() is None
    assert "too few losses" in caplog.text

    class Plain(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    with caplog.at_level(logging.INFO, "loopwright"):
        Tuner(quiet(limit_train_batches=0)).lr_find(Plain(), batches())
    assert "diverging" not in caplog.text


def test_the_suggestion_is_marked_in_the_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    module = made(Net)
    found = Tuner(quiet(max_epochs=2)).lr_find(module, batches(), num_training=STEPS)
    assert found is not None
    _, axes = pyplot.subplots()
    assert found.plot(suggest=True, ax=axes) is axes.figure
    assert axes.get_xscale() == "log"
    curve, point = axes.get_lines()
    assert list(curve.get_ydata()) == found.results["loss"]
    assert list(point.get_xdata()) == [module.lr]
    pyplot.close("all")


# The batch size.


@pytest.mark.parametrize(
    ("mode", "holds", "found"),
    [
        ("power", 1000, 64),
        ("power", 23, 16),
        ("power", 1, 1),
        ("binsearch", 23, 21),
        ("binsearch", 1000, 60),
    ],
)
def test_the_largest_batch_size_that_fits(mode: str, holds: int, found: int):
    module = made(Own, holds=holds)
    size = Tuner(quiet(max_epochs=1)).scale_batch_size(module, mode=mode)
    assert size == module.batch_size == module.hparams.batch_size == found
    expected = fitted(made(Own, batch_size=found, holds=holds), quiet(max_epochs=2))
    if found > 1:
        assert_same(fitted(module, quiet(max_epochs=2)), expected)


def test_limits_of_the_search():
    def search(**arguments: Any) -> int | None:
        return Tuner(quiet()).scale_batch_size(made(Own, holds=40), **arguments)

    assert search(max_val=12) == 12
    assert search(max_trials=2) == 4
    assert search(max_trials=0, init_val=6) == 6
    assert search(mode="binsearch", margin=0.0) == 40
    assert search(init_val=64, steps_per_trial=1) == 32


def test_no_size_is_found_where_no_batch_is_run():
    class Plain(Own):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    tuner = Tuner(quiet(limit_train_batches=0))
    assert tuner.scale_batch_size(made(Plain)) is None


@pytest.mark.parametrize("method", ["fit", "test", "predict"])
def test_the_callback_runs_with_the_size_that_it_finds(tmp_path: Path, method: Any):
    module = made(Own, holds=9)
    finder = BatchSizeFinder("binsearch", margin=0.0)
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = quiet(max_epochs=2, callbacks=[finder, saves], enable_checkpointing=True)
    torch.manual_seed(7)
    getattr(trainer, method)(module)
    assert finder.optimal_batch_size == module.batch_size == 9
    plain = made(Own, holds=9, batch_size=9)
    torch.manual_seed(7)
    getattr(quiet(max_epochs=2), method)(plain)
    assert_same(module, plain)
    if method == "fit":
        resumed = made(Own, holds=9)
        trainer = quiet(max_epochs=2, callbacks=[BatchSizeFinder()])
        trainer.fit(resumed, ckpt_path=tmp_path / "step=9.ckpt")
        assert resumed.losses == module.losses[9:]


def test_the_size_may_be_the_data_modules():
    class Data(DataModule):
        def __init__(self) -> None:
            super().__init__()
            self.size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(dataset(), self.size)

    data = Data()
    module = made(Net, holds=20)
    tuner = Tuner(quiet(max_epochs=1))
    assert tuner.scale_batch_size(module, data, batch_arg_name="size") == 16
    assert data.size == 16
    assert tuner.scale_batch_size(module, datamodule=data, batch_arg_name="size") == 16


def test_mistakes_of_a_size_search_are_named():
    def search(trainer: Trainer, module: Any, *args: Any, **arguments: Any) -> Any:
        return Tuner(trainer).scale_batch_size(module, *args, **arguments)

    with pytest.raises(ValueError, match="dataloaders passed directly"):
        search(quiet(), made(Own), batches())
    with pytest.raises(ValueError, match="Field bs not found"):
        search(quiet(), made(Own), batch_arg_name="bs")
    with pytest.raises(ValueError, match="exclude each other"):
        search(quiet(micro_batch="auto"), made(Own))
    with pytest.raises(ValueError, match="`dataloaders` argument should be None"):
        search(quiet(), made(Own), dataloaders=batches())
    with pytest.raises(ValueError, match="method 'train' is invalid"):
        search(quiet(), made(Own), method="train")
    module = made(Own, holds=0)
    with pytest.raises(torch.OutOfMemoryError, match="a single sample"):
        search(quiet(), module)
    assert module.batch_size == 4

    class Several(Own):
        def test_dataloader(self) -> Any:
            return [batches(), batches()]

    with pytest.raises(ValueError, match="multiple test dataloaders; there are 2"):
        search(quiet(), made(Several), method="test")


# With Lightning, and in several processes.


PROGRAM = """
import json, logging, warnings
warnings.simplefilter("ignore")
import torch
import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, lr=0.1, batch_size=4):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        if len(x) > 23:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return (self.layer(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), self.batch_size)


def trainer(**arguments):
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments)


found = {}
for mode, accumulate in (("exponential", 1), ("exponential", 2), ("linear", 1)):
    pl.seed_everything(0, verbose=False)
    model = Net()
    tuner = Tuner(trainer(max_epochs=20, accumulate_grad_batches=accumulate))
    result = tuner.lr_find(model, num_training=50, min_lr=1e-4, max_lr=3, mode=mode)
    found[f"{mode} {accumulate}"] = [result.results, result.suggestion(), model.lr]
for mode in ("power", "binsearch"):
    model = Net()
    found[mode] = [Tuner(trainer(max_epochs=1)).scale_batch_size(model, mode=mode), model.batch_size]
pl.seed_everything(0, verbose=False)
model = Net()
trainer(max_epochs=2, callbacks=[LearningRateFinder(num_training_steps=30)]).fit(model)
found["fit"] = [model.lr, model.layer.weight.tolist()]
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_found_is_what_lightning_finds(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found = []
    for start in ([], ["-m", "loopwright.lightning"]):
        run = run_program(*start, program, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.split("FOUND ")[1]))
    # There, callbacks get a loss that is divided by the number of batches of a window.
    divided = found[0]["exponential 2"][0]
    divided["loss"] = [2 * loss for loss in divided["loss"]]
    assert found[0] == found[1]


def _searched(strategy: str, norm: bool) -> list[Any]:
    """A fit, one after a search, one by a callback, and with the rate that this has found."""
    arguments: dict[str, Any] = {"max_epochs": 2, "strategy": strategy, "devices": 2}
    plain = fitted(made(Net, norm=norm), quiet(**arguments), batches())
    trainer = quiet(**arguments)
    module = made(Net, norm=norm)
    torch.manual_seed(7)
    Tuner(trainer).lr_find(module, batches(), num_training=STEPS, update_attr=False)
    trainer.fit(module, batches())
    finder = LearningRateFinder(num_training_steps=STEPS, min_lr=1e-4)
    called = fitted(
        made(Net, norm=norm), quiet(callbacks=[finder], **arguments), batches()
    )
    as_found = fitted(made(Net, norm=norm, lr=called.lr), quiet(**arguments), batches())
    return [plain.losses, module.losses, called.losses, as_found.losses, called.lr]


def _sized() -> list[Any]:
    """The size that fits in both of two processes, of which the second holds less; and the fits with it."""
    arguments: dict[str, Any] = {"max_epochs": 2, "strategy": "ddp", "devices": 2}
    module = made(Own, holds=13)
    finder = BatchSizeFinder("binsearch", margin=0.0)
    fitted(module, quiet(callbacks=[finder], **arguments))
    plain = fitted(made(Own, holds=13, batch_size=12), quiet(**arguments))
    predicts = quiet(**arguments)
    size = Tuner(predicts).scale_batch_size(made(Own, holds=13), method="predict")
    return [module.batch_size, module.losses == plain.losses, size]


@pytest.mark.slow
def test_two_processes_look_together():
    runs = all_in_processes(
        2,
        {
            "ddp": (_searched, "ddp", True),
            "fsdp": (_searched, "fsdp", False),
            "sizes": (_sized,),
        },
    )
    for name in ("ddp", "fsdp"):
        plain, after, called, as_found, rate = runs[name]
        assert plain == after, name
        assert called == as_found != plain, name
        assert rate != 0.05
    assert runs["sizes"] == [12, True, 8]


@pytest.mark.slow
def test_from_a_notebook_the_processes_bring_back_what_they_found():
    program = """
import torch
from loopwright.framework import Trainer, Tuner, Module
class Net(Module):
    def __init__(self):
        super().__init__()
        self.lr = 0.1
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
torch.manual_seed(0)
module = Net()
before = module.layer.weight.clone()
trainer = Trainer(accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False)
found = Tuner(trainer).lr_find(module, [torch.randn(8, 4) for _ in range(8)], num_training=20)
assert torch.equal(module.layer.weight, before)
assert module.lr == found.suggestion() and len(found.results["loss"]) == 20 and trainer.global_step == 0
print("found")
"""
    run = run_program("-c", program, timeout=170)
    assert "found" in run.stdout, run.stderr
