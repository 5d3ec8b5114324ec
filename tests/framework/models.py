"""Tiny real modules, data and trainers that the tests of this folder share."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from loopwright.framework import Module, Trainer


class Linear(Module):
    """Linear regression with SGD. ``optimizers`` builds what ``configure_optimizers`` returns from the module."""

    def __init__(
        self, lr: float = 0.1, optimizers: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.lr = lr
        self.configure = optimizers
        self.layer = nn.Linear(2, 1)
        self.seen: list[Tensor] = []  # batches of the training steps

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0])
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Evaluated(Linear):
    """The same with validation, test and prediction."""

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        return self(batch[0])


def data(size: int = 8) -> TensorDataset:
    """``size`` samples; the first feature of sample i is i / 10."""
    x = torch.stack([torch.arange(size) / 10, torch.ones(size)], dim=1)
    return TensorDataset(x, x.sum(1, keepdim=True) * 2)


def loader(batches: int = 4, batch_size: int = 2, **kwargs: Any) -> DataLoader[Any]:
    """A loader of so many batches, in order."""
    return DataLoader(data(batches * batch_size), batch_size=batch_size, **kwargs)


class Told(IterableDataset[Any]):
    """The samples of :func:`data` as a stream, whose length tells another number of them."""

    def __init__(self, size: int, told: int) -> None:
        self.size, self.told = size, told

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Any:
        return iter(data(self.size))


def quiet(*callbacks: Any, **kwargs: Any) -> Trainer:
    """A Trainer for one epoch on the CPU that shows and writes nothing unless asked."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": None
        if any(callback.phase == "persist" for callback in callbacks)
        else False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**arguments, **kwargs})


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def in_a_child(act: Callable[[], Any]) -> int:
    """Begin ``act`` in a forked process; returns its id."""
    if (child := os.fork()) == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(
                1
            )  # whatever happens, the child must not go on as a second test run
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
