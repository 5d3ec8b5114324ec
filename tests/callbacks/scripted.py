"""A real, tiny run whose logged values are known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar
from loopwright.framework import Module, Trainer

BATCHES = 4  # in an epoch


class Scripted(Module):
    """A linear model. ``val_loss`` of epoch i is ``values[i]``; ``train_loss`` is the true loss."""

    def __init__(self, values: tuple[float, ...] = (3.0, 2.0, 1.0)) -> None:
        super().__init__()
        self.values = values
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(
            "val_loss",
            self.values[min(self.current_epoch, len(self.values) - 1)],
            prog_bar=True,
        )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", 0.5)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = BATCHES) -> DataLoader[Any]:
    x = torch.arange(4.0 * batches).reshape(-1, 2) / 10
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=2)


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    """A Trainer for three epochs on the CPU that shows and saves nothing but by these callbacks."""

    def unless_given(kind: type) -> bool | None:
        return (
            None if any(isinstance(callback, kind) for callback in callbacks) else False
        )

    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 3,
        "enable_progress_bar": unless_given(ProgressBar),
        "enable_model_summary": unless_given(ModelSummary),
        "enable_checkpointing": unless_given(ModelCheckpoint),
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def fit(
    *callbacks: Callback,
    module: Module | None = None,
    validate: bool = True,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> Trainer:
    """Fit a :class:`Scripted` module; returns the Trainer."""
    made = trainer(*callbacks, **kwargs)
    made.fit(
        module or Scripted(),
        loader(),
        loader(2) if validate else None,
        ckpt_path=ckpt_path,
    )
    return made
