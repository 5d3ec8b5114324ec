"""Wrong use ends with an error that names the cause and the way out, before training where it can."""

from __future__ import annotations

import copy
import inspect
import json
import re
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
)
from loopwright.framework import CheckpointError, DataModule, Engine, Module, Trainer
from loopwright.loggers import CSVLogger, Logger
from loopwright.strategies import DDPStrategy, Precision, SingleDeviceStrategy
from tests.samples import as_dataset

LAMBDA = LambdaCallback()


class Net(Module):
    """A layer; it counts its training steps."""

    def __init__(self, width: int = 4, note: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)
        self.steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 2, 3))


def trainer(**arguments) -> Trainer:
    arguments = {
        "logger": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
        **arguments,
    }
    return Trainer(enable_progress_bar=False, enable_model_summary=False, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"accelerator": "tpu"}, ["accelerator", "'tpu'", "cpu"]),
        ({"accelerator": "cuda"}, ["accelerator='cuda'", "'cpu'"]),
        ({"devices": 0}, ["devices", "0"]),
        ({"devices": "two"}, ["devices", "'two'"]),
        ({"devices": 2, "strategy": "single"}, ["devices=2", "one process", '"ddp"']),
        ({"num_nodes": 2}, ["num_nodes=2", "torchrun --nnodes 2"]),
        ({"num_nodes": "two"}, ["num_nodes", "'two'"]),
        ({"num_nodes": 0}, ["num_nodes", "0"]),
        ({"strategy": "dpp"}, ["strategy", "'dpp'", "single"]),
        ({"strategy": "dp"}, ['strategy="dp"', '"ddp"']),
        ({"precision": "8-bit"}, ["precision", "'8-bit'", "bf16-mixed"]),
        ({"max_epochs": -2}, ["max_epochs", "-2"]),
        ({"max_epochs": 1.5}, ["max_epochs", "1.5"]),
        ({"max_steps": "7"}, ["max_steps", "'7'"]),
        ({"limit_train_batches": 1.5}, ["limit_train_batches", "1.5", "fraction"]),
        ({"limit_val_batches": -1}, ["limit_val_batches", "-1"]),
        (
            {"overfit_batches": 1, "limit_train_batches": 1},
            ["overfit_batches", "limit_train_batches"],
        ),
        ({"accumulate_grad_batches": 0}, ["accumulate_grad_batches", "0"]),
        ({"gradient_clip_val": -1}, ["gradient_clip_val", "-1"]),
        (
            {"gradient_clip_algorithm": "sum"},
            ["gradient_clip_algorithm", "'sum'", "norm", "value"],
        ),
        ({"val_check_interval": 0}, ["val_check_interval", "0"]),
        (
            {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
            ["val_check_interval", "0.5", "int"],
        ),
        ({"check_val_every_n_epoch": 0}, ["check_val_every_n_epoch", "0"]),
        ({"log_every_n_steps": -1}, ["log_every_n_steps", "-1"]),
        ({"profiler": "quick"}, ["profiler", "'quick'", "simple"]),
        ({"deterministic": "yes"}, ["deterministic", "'yes'", "warn"]),
        ({"max_time": "soon"}, ["soon", "DD:HH:MM:SS"]),
        ({"callbacks": [ModelCheckpoint]}, ["callbacks", "ModelCheckpoint"]),
        ({"logger": "cvs"}, ["logger", "'cvs'", "csv"]),
        (
            {"callbacks": ModelCheckpoint(), "enable_checkpointing": False},
            ["enable_checkpointing", "ModelCheckpoint"],
        ),
        (
            {"callbacks": [EarlyStopping("a"), EarlyStopping("a")]},
            ["EarlyStopping", "state_key"],
        ),
        ({"callbacks": [LAMBDA, LAMBDA]}, ["callbacks", "same LambdaCallback twice"]),
    ],
)
def test_unknown_argument_values(arguments, words) -> None:
    """The argument, what is accepted, and what came."""
    with pytest.raises((ValueError, TypeError)) as error:
        trainer(**arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (
            Trainer,
            {"max_epoch": 3},
            "Trainer has no argument 'max_epoch'; did you mean 'max_epochs'?",
        ),
        (Trainer, {"precison": 16}, "did you mean 'precision'?"),
        (Trainer, {"gpus": 1}, "'gpus': here that is devices=…"),
        (Trainer, {"resume_from_checkpoint": "x"}, "ckpt_path=… of fit"),
        (Trainer, {"progress_bar_refresh_rate": 20}, "RichProgressBar(refresh_rate=…)"),
        (Trainer, {"gradient_accumulation_steps": 2}, "accumulate_grad_batches=…"),
        (Trainer, {"num_train_epochs": 2}, "max_epochs=…"),
        (
            Trainer,
            {"hparams": {}},
            "'hparams'; its arguments are accelerator, strategy",
        ),
        (
            Engine,
            {"mixed_precision": "bf16"},
            "Engine has no argument 'mixed_precision': here that is precision=",
        ),
        (Engine, {"accumulate_grad_batches": 2}, "gradient_accumulation_steps=…"),
        (
            Engine,
            {"logger": "tensorboard"},
            "logger must be a Logger or a list of them, such as TensorBoardLogger",
        ),
        (Engine, {"logger": True}, "got True"),
        (Engine, {"logger": [None]}, "got None"),
    ],
)
def test_an_argument_of_another_name(kind, arguments, words) -> None:
    """Misspelt, or as another trainer calls it: it says what to write."""
    with pytest.raises(TypeError, match=re.escape(words)):
        kind(**arguments)


def test_arguments_by_position_and_of_subclasses() -> None:
    """The Trainer's have names; a subclass that hands its own on gets the same words; tools see the signature."""
    with pytest.raises(
        TypeError,
        match=r"Trainer takes its arguments by name, such as accelerator=…; got 5",
    ):
        Trainer(5)  # pyright: ignore[reportCallIssue] # what is tested

    class Mine(Trainer):
        def __init__(self, mine: int, **kwargs) -> None:
            super().__init__(**kwargs)

    with pytest.raises(TypeError, match="did you mean 'max_steps'"):
        Mine(1, max_step=3)
    assert Mine(1, max_steps=3, logger=False).max_steps == 3
    assert "max_epochs" in inspect.signature(Trainer).parameters


def test_no_training_step() -> None:
    """It names the method, and one that looks like it."""

    class Nameless(Module):
        def train_step(self, batch, batch_idx): ...

    with pytest.raises(
        ValueError,
        match=r"Nameless has no training_step.*did you mean its 'train_step'",
    ):
        trainer().fit(Nameless(), batches())


def test_no_optimizer() -> None:
    """If configure_optimizers is missing; one that returns None is a choice."""

    class Bare(Module):
        training_step = Net.training_step

    with pytest.raises(
        ValueError, match=r"no configure_optimizers.*automatic_optimization = False"
    ):
        trainer().fit(Bare(), batches())


@pytest.mark.parametrize(
    "loader",
    [
        [],
        DataLoader(TensorDataset(torch.randn(3, 3)), batch_size=4, drop_last=True),
        iter([]),
    ],
)
def test_empty_training_loader(loader) -> None:
    """Empty by its length, or found empty."""
    module = Net()
    with pytest.raises(
        (ValueError, RuntimeError), match=r"training loader (is empty|gave no batch)"
    ):
        trainer().fit(module, loader)
    assert module.steps == 0


def test_empty_validation_loader() -> None:
    """Found before training by the sanity check."""
    module = Net()
    with pytest.raises(ValueError, match="validate loader 0 is empty"):
        trainer().fit(module, batches(), DataLoader(TensorDataset(torch.zeros(0, 3))))
    assert module.steps == 0


def test_an_iterator_that_can_be_read_once() -> None:
    """The second epoch says what is the matter."""
    with pytest.raises(RuntimeError, match=r"no batch in epoch 1.*begun again"):
        trainer(max_epochs=2).fit(Net(), iter(batches()))


def test_no_loader() -> None:
    """It names the argument and the method."""
    with pytest.raises(ValueError, match=r"train_dataloaders=.*train_dataloader\(\)"):
        trainer().fit(Net())
    with pytest.raises(ValueError, match="loaders or a datamodule, not both"):
        trainer().fit(Net(), batches(), datamodule=DataModule())


@pytest.mark.parametrize(
    "callback", [EarlyStopping("val_los"), ModelCheckpoint("saved", monitor="val_los")]
)
def test_monitor_that_was_never_logged(callback) -> None:
    """It lists what was logged."""
    with pytest.raises(RuntimeError) as error:
        trainer(callbacks=callback, enable_checkpointing=None).fit(
            Net(), batches(), batches()
        )
    for word in ("val_los", "val_loss", "train_loss"):
        assert word in str(error.value)


def test_monitor_of_a_scheduler_that_was_never_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same for ReduceLROnPlateau; and a missing monitor is found before training."""

    def with_plateau(**options) -> Net:
        module: Any = Net()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        plateau = {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            **options,
        }
        module.configure_optimizers = lambda: {
            "optimizer": optimizer,
            "lr_scheduler": plateau,
        }
        return module

    with pytest.raises(RuntimeError, match=r"monitors 'val_los'.*train_loss, val_loss"):
        trainer().fit(with_plateau(monitor="val_los"), batches(), batches())
    lenient = with_plateau(monitor="val_los", strict=False)
    trainer(max_epochs=2).fit(lenient, batches(), batches())
    assert caplog.text.count("monitors 'val_los', which was not logged") == 1
    module = with_plateau()
    with pytest.raises(ValueError, match=r'ReduceLROnPlateau needs "monitor"'):
        trainer().fit(module, batches(), batches())
    assert module.steps == 0


def test_loss_that_is_not_finite() -> None:
    """detect_anomaly names epoch, batch and step."""

    class Breaking(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("nan") if batch_idx == 2 else 1
            )

    with pytest.raises(
        RuntimeError, match=r"loss is nan at epoch 0, batch 2, global step 2"
    ):
        trainer(detect_anomaly=True).fit(Breaking(), batches())


def test_precision_that_the_device_lacks() -> None:
    """Found by computing something in it, before anything is set up."""
    with pytest.raises(
        ValueError,
        match=r"precision='float4-true'.*'cpu' has no kernels.*use precision",
    ):
        trainer(precision=Precision("float4-true", parameters=torch.float8_e4m3fn))


def test_wrong_returns_of_training_step() -> None:
    """What it may return, and what it did."""
    module: Any = Net()
    module.training_step = lambda batch, batch_idx: {"los": 1}
    with pytest.raises(TypeError, match=r"must return the loss.*got \{'los': 1\}"):
        trainer().fit(module, batches())


def test_misspelt_hooks() -> None:
    """In callbacks when the Trainer gets them, in modules when it runs them; other names are the user's business."""

    class Typo(Callback):
        def on_train_epoch_ends(self, trainer, module): ...

    class Own(Callback):
        def on_my_own_business(self): ...
        def helper(self): ...

    with pytest.raises(
        ValueError,
        match=r"Typo.on_train_epoch_ends would never be called.*'on_train_epoch_end'",
    ):
        trainer(callbacks=[Typo()])
    trainer(callbacks=[Own()])

    class Misspelt(Net):
        def on_validation_epoch_ended(self): ...

    with pytest.raises(ValueError, match=r"did you mean 'on_validation_epoch_end'"):
        trainer().fit(Misspelt(), batches())


class Old(Net):
    """With hooks of other trainers."""

    def validation_epoch_end(self, outputs): ...


class Base(Net):
    """Between Module and the class that is run."""

    def validaton_step(self, batch, batch_idx): ...


class Inherits(Base):
    """Writes nothing itself."""


class OwnBusiness(Net):
    """Calls the method itself, from inside another one, so that it is none that somebody forgot to call."""

    def on_train_epoch_end(self) -> None:
        list(map(lambda n: self.training_epoch_end(n), [1]))

    def training_epoch_end(self, outputs) -> None:
        self.called = outputs

    def text_step(self, batch): ...

    def training_step(self, batch, batch_idx):
        self.text_step(batch)
        return super().training_step(batch, batch_idx)


class OldToo(Old):
    """Calls what its base has: nobody calls that either."""

    def validation_epoch_end(self, outputs):
        super().validation_epoch_end(outputs)


class Both(Net):
    """Knows the right name: the other is its business."""

    def validation_step(self, batch, batch_idx): ...
    def val_step(self, batch, batch_idx): ...


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            Old,
            "Old.validation_epoch_end would never be called: here that is on_validation_epoch_end",
        ),
        (OldToo, "Old.validation_epoch_end would never be called"),
        (
            Base,
            "Base.validaton_step would never be called; did you mean 'validation_step'?",
        ),
        (Inherits, "Base.validaton_step would never be called"),
        (
            type("Loaders", (Net,), {"on_train_dataloader": lambda self: None}),
            "train_dataloader itself",
        ),
        (
            type("Bar", (Net,), {"get_progress_bar_dict": lambda self: {}}),
            "prog_bar=True",
        ),
        (
            type("Val", (Net,), {"val_step": lambda self, batch, batch_idx: None}),
            "did you mean 'validation_step'?",
        ),
        (
            type("Optimizer", (Net,), {"configure_optimizer": lambda self: None}),
            "did you mean 'configure_optimizers'",
        ),
    ],
)
def test_methods_of_modules_that_nobody_calls(kind, words) -> None:
    """Of the class itself, and of a base between it and Module."""
    module = kind()
    with pytest.raises(ValueError, match=re.escape(words)):
        trainer().fit(module, batches())
    assert module.steps == 0


class ByName(Net):
    """Calls its steps by names that it puts together; a subclass overrides them."""

    def training_step(self, batch, batch_idx):
        return getattr(self, "_".join(["train", "step"]))(batch)

    def train_step(self, batch):
        return super().training_step(batch, 0)


class Below(ByName):
    """Overrides what its base calls."""

    def train_step(self, batch):
        return super().train_step(batch)


class ByStage(Net):
    """Puts names together of texts; a subclass brings the methods."""

    def on_train_start(self) -> None:
        getattr(self, f"{'val'}_step")()


class OfStage(ByStage):
    def val_step(self): ...


class InProperties(Net):
    """Calls the method in a property."""

    @property
    def first(self):
        return self.valid_step()

    @cached_property
    def second(self):
        return self.test_steps()

    def valid_step(self): ...
    def test_steps(self): ...


class MoreWords(Net):
    """Called from a script, and no misspelling: other words."""

    def predict_next_step(self, batch): ...
    def num_training_steps(self): ...


def given(hook):
    """Give a hook more than it is called with."""
    return wraps(hook)(lambda self, *args: hook(self, *args, more=1))


class Injected(Net):
    """Its hooks take more than they are called with."""

    @given
    def on_train_start(self, more): ...
    @given
    def training_step(self, batch, batch_idx, more):
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "kind",
    [OwnBusiness, Both, ByName, Below, OfStage, InProperties, MoreWords, Injected],
)
def test_methods_that_are_the_authors_business(kind) -> None:
    """What the class calls itself, and what stands beside the right name."""
    module = kind()
    trainer().fit(module, batches())
    assert module.steps == 3


def test_a_mixin_of_another_library_is_its_own_business() -> None:
    """It may be for a trainer beside ours; one of the same program is not."""
    mixin = type(
        "Mixin",
        (),
        {"on_train_epoch_ends": lambda self: None, "__module__": "somewhere.else"},
    )
    trainer().fit(type("Mixed", (Net, mixin), {})(), batches())
    mixin.__module__ = __name__
    with pytest.raises(ValueError, match="did you mean 'on_train_epoch_end'"):
        trainer().fit(type("Mixed", (Net, mixin), {})(), batches())


def test_what_another_librarys_class_asks_for() -> None:
    """A subclass overrides its methods, and a callback may be for a second trainer, beside the names of this one."""
    foreign = type(
        "Foreign", (), {"val_step": lambda self: None, "__module__": "somewhere.else"}
    )
    trainer().fit(
        type("Mixed", (Net, foreign), {"val_step": lambda self: None})(), batches()
    )

    class ForTwo(Callback):
        def on_train_begin(self, args, state, control): ...
        def on_train_start(self, trainer, module): ...

    trainer(callbacks=[ForTwo()])
    del ForTwo.on_train_start
    with pytest.raises(ValueError, match="here that is on_train_start"):
        trainer(callbacks=[ForTwo()])


class Metric(Logger):
    """Its method has MLflow's name."""

    def log_metric(self, metrics, step): ...


class Rows(Logger):
    """Knows the right name beside it."""

    def log_metric(self, name, value): ...
    def log_metrics(self, metrics, step): ...


class Elsewhere(SingleDeviceStrategy):
    """As for another trainer."""

    def optimizer_step(self, optimizer): ...


class Misspelt(DDPStrategy):
    def back_ward(self, loss): ...


class HalfMade(DDPStrategy):
    def __init__(self) -> None:
        self.mine = 1


class HalfMadeLogger(CSVLogger):
    def __init__(self) -> None:
        self.mine = 1


class HalfMadeStopping(EarlyStopping):
    def __init__(self) -> None:
        self.mine = 1


class Data(DataModule):
    def on_before_batch_transfers(self, batch, dataloader_idx): ...
    def train_dataloader(self):
        return batches()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"logger": Metric},
            "Metric.log_metric would never be called; did you mean 'log_metrics'?",
        ),
        (
            {"strategy": Elsewhere},
            "Elsewhere.optimizer_step would never be called: here that is step",
        ),
        ({"strategy": Misspelt}, "did you mean 'backward'?"),
        (
            {"strategy": HalfMade},
            "HalfMade.__init__ has not called DDPStrategy's: begin it with super().__init__(…)",
        ),
        (
            {"logger": HalfMadeLogger},
            "HalfMadeLogger.__init__ has not called CSVLogger's",
        ),
        (
            {"callbacks": HalfMadeStopping},
            "HalfMadeStopping.__init__ has not called EarlyStopping's",
        ),
    ],
)
def test_what_a_strategy_logger_or_callback_lacks(arguments, words) -> None:
    """When the Trainer gets it; an Engine says the same."""
    ((name, kind),) = arguments.items()
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        trainer(**{name: kind()})
    if name != "callbacks":
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            Engine(**{"accelerator": "cpu", "devices": 1, name: kind()})
    assert trainer(logger=Rows()).loggers


def test_hooks_of_data_and_what_hooks_get() -> None:
    """Found before anything runs: names of a DataModule, and arguments that a hook could not be called with."""
    with pytest.raises(ValueError, match="did you mean 'on_before_batch_transfer'"):
        trainer().fit(Net(), datamodule=Data())

    class Short(Callback):
        def on_train_epoch_end(self, trainer): ...

    module = Net()
    with pytest.raises(
        TypeError,
        match=r"Short.on_train_epoch_end\(trainer\) is called with \(trainer, pl_module\)",
    ):
        trainer(callbacks=Short()).fit(module, batches())
    for name, method, words in (
        (
            "on_train_epoch_end",
            lambda outputs: None,
            r"on_train_epoch_end\(outputs\) is called with \(\)",
        ),
        (
            "training_step",
            lambda batch, batch_idx, optimizer_idx: None,
            r"is called with \(batch, batch_idx\); with sev",
        ),
        (
            "on_before_optimizer_step",
            lambda optimizer, optimizer_idx: None,
            r"with \(optimizer\); with several",
        ),
        (
            "lr_scheduler_step",
            lambda scheduler, idx, metric: None,
            r"is called with \(scheduler, metric\)",
        ),
        (
            "optimizer_zero_grad",
            lambda epoch, batch_idx, optimizer, optimizer_idx: None,
            r"optimizer\); with several",
        ),
        (
            "configure_gradient_clipping",
            lambda optimizer, optimizer_idx, value, how: None,
            r"optimizer\); with sev",
        ),
        ("setup", lambda: None, r"setup\(\) is called with \(stage\)"),
    ):
        module = Net()
        setattr(module, name, method)
        with pytest.raises(TypeError, match=words):
            trainer().fit(module, batches())
    assert module.steps == 0


def test_what_hooks_may_take() -> None:
    """Fewer, more or all, where ours has defaults: they are not refused for want of one."""

    class Required(Callback):
        def on_validation_batch_end(
            self, trainer, module, outputs, batch, batch_idx, dataloader_idx
        ):
            self.last = dataloader_idx

        def on_train_batch_end(self, *args, **kwargs): ...

    module: Any = Net()
    callback = Required()
    module.validation_step = lambda batch, batch_idx, dataloader_idx: None
    module.configure_gradient_clipping = (
        lambda optimizer, gradient_clip_val, gradient_clip_algorithm: None
    )
    trainer(callbacks=callback).fit(
        module,
        batches(),
        [DataLoader(as_dataset(torch.randn(2, 3))) for _ in range(2)],
    )
    assert (module.steps, callback.last) == (3, 1)


def test_a_forgotten_call_of_the_constructor_above() -> None:
    """A Module, a DataModule and a Callback need none."""

    class Forgets(Net):
        def __init__(self) -> None:
            self.layer = nn.Linear(3, 4)
            self.steps = 0

    class Counts(Callback):
        def __init__(self) -> None:
            self.ends = 0

        def on_fit_end(self, trainer, module) -> None:
            self.ends += 1

    class Loads(DataModule):
        def __init__(self) -> None:
            self.size = 3

        def train_dataloader(self):
            return batches(self.size)

    module, counts = Forgets(), Counts()
    trainer(callbacks=counts).fit(module, datamodule=Loads())
    assert (module.steps, counts.ends) == (3, 1)
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    assert copy.deepcopy(module).layer.weight.equal(module.layer.weight)


LOSSES = {
    "a vector": (
        lambda m, x: m.layer(x).square().mean(1),
        r"one real number.*got shape \(2,\) of torch.float",
    ),
    "complex": (
        lambda m, x: m.layer(x).mean() * 1j,
        r"one real number.*got shape \(\) of torch.complex",
    ),
    "detached": (lambda m, x: m.layer(x).mean().detach(), "the loss has no gradient"),
    "used": (
        lambda m, x: used(m.layer(x).square().mean()),
        "the graph of the loss has been used before",
    ),
}


def used(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


class Hook(Callback):
    def on_after_backward(self, trainer, module): ...


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"precision": "16-mixed"},
        {"callbacks": Hook()},
    ],
    ids=["bare", "accumulated", "scaled", "hooked"],
)
def test_losses_without_a_gradient(loss, arguments) -> None:
    """Of any way in which the loop computes gradients: in automatic and manual optimization, and on the Engine."""
    compute, words = LOSSES[loss]
    automatic: Any = Net()
    manual: Any = Net()
    automatic.training_step = lambda batch, batch_idx: compute(automatic, batch)
    manual.automatic_optimization = False
    manual.training_step = lambda batch, batch_idx: manual.manual_backward(
        compute(manual, batch)
    )
    for module in (automatic, manual):
        with pytest.raises(RuntimeError, match=words) as error:
            trainer(**arguments).fit(module, batches())
        assert isinstance(error.value.__cause__, RuntimeError)  # torch's own words
        assert error.value.__cause__.__cause__ is None


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_without_a_gradient_on_the_engine(loss) -> None:
    """The same words, with windows and without."""
    compute, words = LOSSES[loss]
    for steps in (1, 2):
        engine = Engine(accelerator="cpu", devices=1, gradient_accumulation_steps=steps)
        module, _ = engine.prepare(Net(), torch.optim.SGD(Net().parameters(), 0.1))
        with engine.accumulate(module), pytest.raises(RuntimeError, match=words):
            engine.backward(compute(module, torch.ones(2, 3)))


class Sharp(torch.optim.SGD):
    """As SAM: says only at its step that it needs a closure."""

    def step(self, closure=None):
        assert closure is not None, "Sharp requires closure, but it was not provided"


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_clip_val": 1.0}], ids=["bare", "clipped"]
)
def test_optimizers_that_need_a_closure(arguments) -> None:
    """Get one if they say so, or the module asks for it; else the error tells how."""
    module = Net()
    module.configure_optimizers = lambda: Sharp(module.parameters())
    with pytest.raises(
        RuntimeError,
        match=r"needs a closure.*define optimizer_step\(self.*step\(closure.*automatic_optimization = False",
    ):
        trainer(**arguments).fit(module, batches())
    assert module.steps == 1


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "float16"), (torch.complex64, "complex64")]
)
def test_parameters_whose_gradients_cannot_be_scaled(dtype, name) -> None:
    """Found before training; frozen ones may be of any type."""

    def make() -> Net:
        module = Net()
        module.extra = nn.Parameter(torch.ones(2, dtype=dtype))
        return module

    words = rf"precision='16-mixed' scales the loss.*torch.{name}.*shape \(2,\)"
    module = make()
    with pytest.raises(ValueError, match=words):
        trainer(precision="16-mixed").fit(module, batches())
    assert module.steps == 0
    engine = Engine(accelerator="cpu", devices=1, precision="16-mixed")
    with pytest.raises(ValueError, match=words):
        engine.prepare(module, torch.optim.SGD(module.parameters(), 0.1))
    module.extra.requires_grad_(False)
    trainer(precision="16-mixed").fit(module, batches())
    assert module.steps == 3


def test_optimizers_of_nothing(caplog) -> None:
    """Of a module without parameters, of another module's, and, under a loss scale, of those without a gradient."""

    class Listed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layer = None
            self.layers = [nn.Linear(3, 4)]

    with pytest.raises(ValueError, match=r"Listed has no parameters.*nn.ModuleList"):
        trainer().fit(Listed(), batches())
    module, other = Net(), nn.Linear(1, 1)
    module.configure_optimizers = lambda: torch.optim.SGD(other.parameters(), 0.1)
    trainer().fit(module, batches())
    assert "an optimizer of none of Net's parameters" in caplog.text
    words = (
        r"no parameter of the optimizer \(SGD\) has a gradient.*engine.backward\(loss\)"
    )
    with pytest.raises(RuntimeError, match=words):
        trainer(precision="16-mixed").fit(module, batches())
    engine = Engine(accelerator="cpu", devices=1, precision="16-mixed")
    _, optimizer = engine.prepare(other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()


def test_what_is_asked_for_too_early() -> None:
    """Instead of an assertion, or of what Python says of None."""

    class Asks(Callback):
        def setup(self, trainer, module, stage):
            _ = trainer.estimated_stepping_batches

    with pytest.raises(RuntimeError, match="no training loader"):
        trainer(callbacks=Asks()).validate(Net(), batches())
    with pytest.raises(RuntimeError, match="once fit has called configure_optimizers"):
        trainer().optimizers = []
    with pytest.raises(
        RuntimeError, match="2 processes cannot meet, as they have not been started"
    ):
        Engine(accelerator="cpu", devices=2, launch=False).connect()
    with pytest.raises(
        TypeError, match=r'ckpt_path must be a path, "best", "last" or None; got 3'
    ):
        trainer().fit(Net(), batches(), ckpt_path=3)  # type: ignore[arg-type] # on purpose
    module: Any = Net()
    module.automatic_optimization = False
    module.training_step = lambda batch, batch_idx: (
        module.layer(batch).sum().backward(), module.optimizers().step()
    )  # fmt: skip
    with pytest.raises(
        RuntimeError,
        match=r"loss.backward\(\) was called.*self.manual_backward\(loss\)",
    ):
        trainer(precision="16-mixed").fit(module, batches())


def test_gradients_in_an_evaluation_step() -> None:
    """The step, and how to have them."""

    class Penalty(Net):
        def validation_step(self, batch, batch_idx):
            x = batch.clone().requires_grad_()
            torch.autograd.grad(self.layer(x).sum(), x)

    with pytest.raises(
        RuntimeError,
        match=r"validation_step computes gradients.*enable_grad.*inference_mode=False",
    ):
        trainer().validate(Penalty(), batches())


def test_a_mixin_that_makes_the_module() -> None:
    """Its ``__new__`` sees the constructor's arguments."""

    class Noted:
        def __new__(cls, *args, **kwargs):
            made = super().__new__(cls)
            made.__dict__["noted"] = args
            return made

    class Mixed(Net, Noted): ...

    assert Mixed(5).noted == (5,)


class Opaque:
    """An object that is neither tensor nor JSON."""


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a run whose hyperparameters hold an object."""
    run = trainer()
    run.fit(Net(note=Opaque()), batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def test_checkpoint_that_needs_its_objects(checkpoint, monkeypatch) -> None:
    """Resuming does not need them; constructing from them does, and says how."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was opened")

    with monkeypatch.context() as patch:
        patch.setattr("pickle.loads", refuse)
        patch.setattr("torch.load", refuse)
        trainer(max_epochs=2).fit(Net(), batches(), ckpt_path=checkpoint)
        with pytest.raises(
            CheckpointError, match=r"hyper_parameters.note.*weights_only=False"
        ):
            Net.load_from_checkpoint(checkpoint)
        assert Net.load_from_checkpoint(checkpoint, note="mine").hparams.note == "mine"
    assert isinstance(
        Net.load_from_checkpoint(checkpoint, weights_only=False).hparams.note, Opaque
    )


def test_every_file_of_a_checkpoint_is_verified(checkpoint) -> None:
    """One altered byte, a truncated file, a missing one: named before training."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(files) >= 7
    for file in files:
        weights_only = False if file.name == "objects.pkl" else None
        content = file.read_bytes()
        altered = bytearray(content)
        altered[len(content) // 2] ^= 1
        for damaged in (bytes(altered), content[:-1], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            module = Net()
            with pytest.raises(CheckpointError, match=file.name):
                trainer(max_epochs=2).fit(
                    module, batches(), ckpt_path=checkpoint, weights_only=weights_only
                )
            assert module.steps == 0
            file.write_bytes(content)


def test_checkpoint_for_another_architecture(checkpoint) -> None:
    """It names the parameters and the module that saved it."""
    with pytest.raises(
        CheckpointError,
        match=r"of Net.*another architecture(.|\n)*layer.weight(.|\n)*strict_loading",
    ):
        Net.load_from_checkpoint(checkpoint, width=5, note=None)
    module = Net(width=5)
    with pytest.raises(CheckpointError, match="another architecture"):
        trainer(max_epochs=2).fit(module, batches(), ckpt_path=checkpoint)
    assert module.steps == 0


def test_checkpoints_that_are_none(tmp_path) -> None:
    """A missing path, a file of something else, a directory without a manifest, one of a later format."""
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        trainer().fit(Net(), batches(), ckpt_path=tmp_path / "nowhere.ckpt")
    (tmp_path / "begun.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"begun\.ckpt' is damaged: it was cut"):
        trainer().fit(Net(), batches(), ckpt_path=tmp_path / "begun.ckpt")
    (tmp_path / "foreign.ckpt").write_bytes(b"epoch: 3")
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt"):
        trainer().fit(Net(), batches(), ckpt_path=tmp_path / "foreign.ckpt")
    (tmp_path / "half.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        trainer().fit(Net(), batches(), ckpt_path=tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match='ckpt_path="best"'):
        trainer().fit(Net(), batches(), ckpt_path="best")


def test_manual_steps_that_never_reach_max_steps() -> None:
    """Where nothing else ends the fit; a limit of epochs ends it, with a line."""

    class Stepless(Net):
        automatic_optimization = False

    with pytest.raises(RuntimeError, match=r"max_steps=3 is never reached"):
        trainer(max_epochs=None, max_steps=3).fit(Stepless(), batches())
    trainer(max_epochs=2, max_steps=3).fit(Stepless(), batches())


def test_weights_alone_cannot_resume(tmp_path) -> None:
    """A checkpoint saved with weights_only=True loads into a module, but does not resume."""
    run = trainer()
    run.fit(Net(), batches())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert Net.load_from_checkpoint(tmp_path / "weights.ckpt").hparams.width == 4
    assert "optimizer_states" not in json.loads(
        (tmp_path / "weights.ckpt" / "state.json").read_text()
    )
    with pytest.raises(CheckpointError, match="cannot resume"):
        trainer(max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "weights.ckpt")


def test_numbers_of_numpy_are_numbers() -> None:
    """Computed step counts and sweeps bring them."""
    three: Any = np.int64(3)
    two: Any = np.int64(2)
    one: Any = np.int64(1)
    given = trainer(
        max_epochs=np.int64(2), log_every_n_steps=np.int32(3), limit_train_batches=np.float32(0.5),
        gradient_clip_val=np.float64(1.0), devices=np.int64(1), accumulate_grad_batches=np.int64(2),
        callbacks=[EarlyStopping("train_loss", patience=three), ModelCheckpoint(save_top_k=one)],
        enable_checkpointing=True,
    )  # fmt: skip
    assert (given.max_epochs, given.limit_train_batches) == (2, 0.5)
    assert all(
        type(value) in (int, float)
        for value in (given.max_epochs, given.limit_train_batches)
    )
    assert (
        Engine(
            accelerator="cpu", gradient_accumulation_steps=two
        ).gradient_accumulation_steps
        == 2
    )


def test_a_scheduler_of_an_optimizer_that_is_not_returned() -> None:
    """It would change nothing."""
    module: Any = Net()
    optimizer, other = (torch.optim.SGD(module.parameters(), 0.1) for _ in range(2))
    module.configure_optimizers = lambda: (
        [optimizer],
        [torch.optim.lr_scheduler.StepLR(other, 1)],
    )
    with pytest.raises(
        ValueError, match="the StepLR is for a SGD that was not returned"
    ):
        trainer().fit(module, batches())
    module.configure_optimizers = lambda: [
        {"optimizer": optimizer}, {"optimizer": other, "lr_scheduler": torch.optim.lr_scheduler.StepLR(other, 1)}
    ]  # fmt: skip
    module.automatic_optimization = False
    module.training_step = lambda batch, batch_idx: None
    trainer().fit(module, batches())


class HasOldBackward(Net):
    def backward(self, loss, optimizer, optimizer_idx): ...


class OldRows(Logger):
    def log_metrics(self, metrics): ...


class HasLoader(DataModule):
    train_dataloader = batches()  # type: ignore[assignment] # on purpose


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (
            lambda: trainer().fit(HasOldBackward(), batches()),
            "backward(loss, optimizer, optimizer_idx) is called with",
        ),
        (
            lambda: trainer(logger=OldRows()),
            "log_metrics(metrics) is called with (metrics, step)",
        ),
        (
            lambda: trainer().fit(Net(), datamodule=HasLoader()),
            "train_dataloader must be a method that returns the",
        ),
    ],
)
def test_methods_that_cannot_be_called_as_they_will_be(start, words) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        start()


def test_a_run_that_does_nothing_says_so(caplog) -> None:
    """Where a limit or an interval leaves no training, no validation or no checkpoint."""
    trainer(limit_train_batches=0).fit(Net(), batches())
    saves = ModelCheckpoint("kept", every_n_epochs=5)
    trainer(check_val_every_n_epoch=10, callbacks=saves, enable_checkpointing=True).fit(
        Net(), batches(), batches()
    )
    lines = [record.getMessage() for record in caplog.records]
    assert (
        sum("Nothing is trained: limit_train_batches=0" in line for line in lines) == 1
    )
    assert (
        sum(
            "Nothing is validated: check_val_every_n_epoch=10, and max_epochs=1" in line
            for line in lines
        )
        == 1
    )
    assert (
        sum(
            "ModelCheckpoint(every_n_epochs=5) saves nothing: max_epochs=1" in line
            for line in lines
        )
        == 1
    )
