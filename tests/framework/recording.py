"""Subclasses that record each call of their hooks, and a notation for what they should have recorded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback
from loopwright.framework import DataModule, Module
from loopwright.framework.datamodule import DataHooks
from tests.samples import as_dataset

# What users call or read; everything else that is public is called by the Trainer.
_NO_HOOKS = {
    Module: (
        "print", "all_gather", "log", "log_dict", "optimizers", "lr_schedulers", "manual_backward", "clip_gradients",
        "toggle_optimizer", "untoggle_optimizer", "toggled_optimizer", "freeze", "unfreeze", "load_from_checkpoint",
    ),
    DataModule: ("from_datasets",),
    Callback: ("log", "log_dict"),
}  # fmt: skip


class Recorder:
    """The calls in their order, and the state that each one saw."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.states: list[
            tuple[int, int, bool, bool]
        ] = []  # epoch, step, module in training mode, gradients enabled
        self.arguments: list[tuple[str, tuple[Any, ...]]] = []
        self.trainer: Any = None
        self.module: Any = None

    def note(self, event: str, arguments: tuple[Any, ...] = ()) -> None:
        self.events.append(event)
        self.arguments.append((event, arguments))
        if self.trainer is not None:
            trainer, training = self.trainer, self.module.training
            self.states.append(
                (
                    trainer.current_epoch,
                    trainer.global_step,
                    training,
                    torch.is_grad_enabled(),
                )
            )

    def forget(self) -> None:
        self.events, self.states, self.arguments = [], [], []


def recording(
    cls: type,
    base: type,
    owner: str,
    recorder: Recorder,
    without: tuple[str, ...] = (),
    closure: bool = False,
) -> Any:
    """A subclass of ``cls`` that overrides each hook of the contract ``base`` and records it.

    Its ``optimizer_step`` takes a closure if ``closure`` says so.
    """
    names = [
        name
        for contract in (base, DataHooks)
        if issubclass(base, contract)
        for name, value in vars(contract).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and name not in (*_NO_HOOKS[base], *without)
    ]
    recorded = type(f"Recording{cls.__name__}", (cls,), {})

    def recorded_method(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.note(f"{owner}.{name}", args)
            return getattr(super(recorded, self), name)(*args, **kwargs)

        signature = inspect.signature(getattr(cls, name))  # steps are asked theirs
        if name == "optimizer_step" and not closure:
            parameters = list(signature.parameters.values())[:4]
            signature = signature.replace(parameters=parameters)
        method.__signature__ = signature
        return method

    for name in names:
        setattr(recorded, name, recorded_method(name))
    return recorded


def samples(count: int) -> DataLoader[Any]:
    return DataLoader(
        as_dataset(torch.randn(count, 4, generator=torch.Generator().manual_seed(0))),
        batch_size=1,
    )


class Loaders:
    """Four training batches, and two of each other kind."""

    def train_dataloader(self) -> Any:
        return samples(4)

    def val_dataloader(self) -> Any:
        return samples(2)

    def test_dataloader(self) -> Any:
        return samples(2)

    def predict_dataloader(self) -> Any:
        return samples(2)


class Data(Loaders, DataModule):
    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}


class Tiny(Loaders, Module):
    """A linear layer, with the mistakes and habits that a test asks for.

    Args:
        scheduler: ``"step"``, ``"epoch"``, ``"plateau"`` or None.
        fails: the exception and the step in which its second batch raises it.
        none_at: the batch for which ``training_step`` returns None.
        skip_at: the batch of the first epoch at which ``on_train_batch_start`` returns -1.
        manual: do the steps in ``training_step``.
    """

    def __init__(
        self,
        scheduler: str | None = "step",
        fails: tuple[type[BaseException], str] | None = None,
        none_at: int | None = None,
        skip_at: int | None = None,
        manual: bool = False,
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.scheduler, self.fails, self.none_at, self.skip_at = (
            scheduler,
            fails,
            none_at,
            skip_at,
        )
        self.automatic_optimization = not manual

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.skip_at and self.current_epoch == 0 else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.fail("training_step", batch_idx)
        if batch_idx == self.none_at:
            return None
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.fail("validation_step", batch_idx)
        self.log("val_loss", self.layer(batch).square().mean())

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.layer(batch).square().mean())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        if self.scheduler is None:
            return optimizer
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }
        step_lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_lr, "interval": self.scheduler},
        }

    def fail(self, step: str, batch_idx: int) -> None:
        if self.fails is not None and step == self.fails[1] and batch_idx == 1:
            raise self.fails[0](f"from {step}")


class Observer(Callback):
    """A callback with a state that does what a test asks for: ``Observer(on_train_batch_end=function)``."""

    def __init__(self, **acts: Any) -> None:
        self.acts = acts

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def on_train_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int
    ) -> Any:
        act = self.acts.get("on_train_batch_start")
        return act(trainer, batch_idx) if act is not None else None

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (act := self.acts.get("on_train_batch_end")) is not None:
            act(trainer, batch_idx)


def expand(text: str, blocks: dict[str, str]) -> list[str]:
    """The events that ``text`` notes.

    One hook a line. ``a+b.hook`` is a.hook, then b.hook; a hook without owner is the callback's, then the module's;
    ``<NAME>`` stands for a block; ``2 x [`` to ``]`` is repeated; what follows ``#`` is a remark.
    """
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return _expand([line for line in lines if line], blocks)


def _expand(lines: list[str], blocks: dict[str, str]) -> list[str]:
    events: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        position += 1
        times = 1
        if line.endswith(" x ["):
            begin, depth = position, 1
            while depth:
                depth += (lines[position].endswith("[")) - (lines[position] == "]")
                position += 1
            events += _expand(lines[begin : position - 1], blocks) * int(
                line.split()[0]
            )
            continue
        if line.startswith(tuple("123456789")):
            count, line = line.split(" x ")
            times = int(count)
        if line.startswith("<"):
            events += expand(blocks[line], blocks) * times
            continue
        owners, _, hook = line.rpartition(".")
        events += [
            f"{owner}.{hook}" for owner in (owners or "callback+module").split("+")
        ] * times
    return events
