"""Change from one epoch to another how many batches an optimizer step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .arguments import require, require_int
from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class GradientAccumulationScheduler(Callback):
    """Let an optimizer step take more, or fewer, batches from some epochs on.

    ``GradientAccumulationScheduler({0: 8, 4: 4, 8: 1})`` steps on 8 batches in the epochs 0 to 3, on 4 in those to 7,
    and then on each. A run that resumes goes on with the number of its epoch.

    Args:
        scheduling: for epochs, the number of batches that counts from there on; 1 before the first.

    Attributes:
        scheduling: as given, with the number in epoch 0.
        epochs: its epochs, in order.

    Raises:
        ValueError: if it is no such mapping.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        valid = isinstance(scheduling, Mapping) and bool(scheduling)
        accepted = "a dict of numbers of batches by epoch, such as {0: 8, 4: 1}"
        require(valid, "scheduling", accepted, scheduling)
        for epoch, num_batches in scheduling.items():
            require_int("scheduling: an epoch", epoch, 0)
            require_int("scheduling: a number of batches", num_batches, 1)
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """How many batches an optimizer step takes in an epoch."""
        begun = [first for first in self.epochs if first <= epoch]
        return self.scheduling[begun[-1]]

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether a step takes several batches in any epoch."""
        return any(num_batches > 1 for num_batches in self.scheduling.values())

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        begins = stage == "fit" and trainer.global_step == 0
        if begins and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and the "
                f"GradientAccumulationScheduler({self.scheduling}) set the same: leave one of them out"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        num_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
        if num_batches != trainer.accumulate_grad_batches:
            trainer.accumulate_grad_batches = num_batches
