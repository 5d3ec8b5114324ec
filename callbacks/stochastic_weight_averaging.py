"""Stochastic weight averaging: an average over the last epochs, at a learning rate of its own."""

from __future__ import annotations

from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from .arguments import require, require_choice, require_int
from .weight_averaging import KeepsAverage, average_by
from .weight_set import WeightSet

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

_CPU = torch.device("cpu")


class StochasticWeightAveraging(KeepsAverage):
    """Averages the weights with which the last epochs begin, while the learning rate anneals to one of its own.

    From the first of these epochs on, torch's ``SWALR`` takes the place of the module's scheduler. After the training,
    the statistics of batch norms are computed anew for the average, by the training steps of one epoch without
    gradients, and the module has the average. What was trained stays beside it, in checkpoints too, as with
    :class:`~.weight_averaging.WeightAveraging`. (Izmailov and others, "Averaging Weights Leads to Wider Optima and
    Better Generalization", 2018.)

    Args:
        swa_lrs: the learning rate to anneal to, or one for each parameter group.
        swa_epoch_start: the first epoch that counts, from 1; or a fraction of ``max_epochs``.
        annealing_epochs: over how many epochs to anneal.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: as of :class:`~.weight_averaging.WeightAveraging`. Default: all epochs weigh the same.
        device: where to keep the average; None: where the weights are.
        evaluate: run validation, test and prediction on the average, whose batch norms have the statistics of the
            training until it ends.
        name: of the average in checkpoints.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: Any = None,
        device: torch.device | str | None = _CPU,
        *,
        evaluate: bool = False,
        name: str = "swa",
    ) -> None:
        require(
            _is_start(swa_epoch_start),
            "swa_epoch_start",
            "an int of at least 1, or a float from 0 to 1",
            swa_epoch_start,
        )
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        are_rates = bool(rates) and all(
            isinstance(rate, float) and rate > 0 for rate in rates
        )
        require(
            are_rates,
            "swa_lrs",
            "a positive float, or a list of positive floats",
            swa_lrs,
        )
        require_int("annealing_epochs", annealing_epochs, 0)
        require_choice("annealing_strategy", annealing_strategy, "cos", "linear")
        is_function = avg_fn is None or callable(avg_fn)
        require(is_function, "avg_fn", "a function, or None", avg_fn)
        self.swa_lrs = swa_lrs
        self.swa_epoch_start = swa_epoch_start
        self.annealing_epochs = annealing_epochs
        self.annealing_strategy = annealing_strategy
        weights = WeightSet(name, device, False, evaluate)
        super().__init__(weights, average_by(avg_fn))
        self._max_epochs = -1
        self._has_begun = False
        # Whether the average has the statistics of batch norms that are its own.
        self._is_finished = False

    @property
    def swa_start(self) -> int:
        """Index of the first epoch that counts."""
        start = self.swa_epoch_start
        if isinstance(start, float):
            start = int(start * self._max_epochs)
        return max(start - 1, 0)

    @property
    def swa_end(self) -> float:
        """Index of the last one; infinite without ``max_epochs``."""
        return float("inf") if self._max_epochs == -1 else self._max_epochs - 1

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        _require_one(trainer.optimizers, "optimizers")
        _require_one(trainer.lr_scheduler_configs, "schedulers")
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        if self._max_epochs == -1 and isinstance(self.swa_epoch_start, float):
            raise ValueError(
                f"swa_epoch_start={self.swa_epoch_start} is a fraction of max_epochs, and there is none: pass the "
                "number of an epoch"
            )
        super().on_fit_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._has_begun = False
        if self._has_begun:
            # A run that goes on; the scheduler's state is loaded next.
            self._anneal(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end:
            return
        if not self._has_begun:
            self._has_begun = True
            if trainer.is_global_zero:
                self._tell_of_replaced(trainer.lr_scheduler_configs)
            self._anneal(trainer)
        if epoch > self._latest_update_epoch:
            self._update(trainer, pl_module)
            self._is_finished = False
            self._latest_update_epoch = epoch

    def _tell_of_replaced(self, configs: list[Any]) -> None:
        """Say which scheduler steps no longer."""
        for config in configs:
            log.info(
                "The learning rate anneals for the average: SWALR takes the place of %s",
                type(config.scheduler).__name__,
            )

    def _anneal(self, trainer: Trainer) -> None:
        """Let a scheduler anneal the learning rate, in the place of the one that there is."""
        optimizer = trainer.optimizers[0]
        groups = optimizer.param_groups
        rates = self.swa_lrs
        rates = rates if isinstance(rates, list) else [rates] * len(groups)
        accepted = f"one for each of {len(groups)} parameter groups"
        require(len(rates) == len(groups), "swa_lrs", accepted, rates)
        for group, rate in zip(groups, rates, strict=True):
            group["initial_lr"] = rate
        options: Any = (rates, self.annealing_epochs, self.annealing_strategy)
        trainer.lr_scheduler_configs = [SWALR(optimizer, *options)]

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        # A run that was killed at its end, and is resumed, has nothing left to train.
        if not self._is_finished:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: Module) -> None:
        """Give the average the module's buffers, and the statistics of batch norms that belong to it."""
        weights = self.weight_set
        if not weights.tensors:
            return
        self._is_finished = True
        weights.copy_buffers(pl_module)
        if any(isinstance(part, _BatchNorm) for part in pl_module.modules()):
            with weights.within(pl_module, trainer.strategy):
                _compute_statistics(trainer, pl_module)
                weights.copy_buffers(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"has_begun": self._has_begun, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._is_finished = False
        self._has_begun = state_dict["has_begun"]


def _is_start(start: Any) -> bool:
    """Whether it is the number of an epoch, from 1, or a fraction of all."""
    if isinstance(start, float):
        return 0 <= start <= 1
    return type(start) is int and start >= 1


def _require_one(items: list[Any], kind: str) -> None:
    """Refuse several optimizers or schedulers.

    Raises:
        ValueError: with their number.
    """
    if len(items) > 1:
        raise ValueError(
            f"StochasticWeightAveraging anneals one optimizer, with one scheduler or none; the module has "
            f"{len(items)} {kind}. WeightAveraging averages under any"
        )


def _compute_statistics(trainer: Trainer, module: Module) -> None:
    """Compute the statistics of a module's batch norms anew, over the training batches of all ranks."""
    if not module.automatic_optimization:
        log.warning(
            "The statistics of batch norms are those of the training, as training_step steps the optimizers "
            "itself: compute them by torch.optim.swa_utils.update_bn"
        )
        return
    parts = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [part.momentum for part in parts]
    for part in parts:
        part.reset_running_stats()
        # The mean over all batches.
        part.momentum = None
    try:
        trainer.forward_training_batches()
    finally:
        for part, momentum in zip(parts, momenta, strict=True):
            part.momentum = momentum
    for part in parts:
        for buffer in part.buffers():
            mean = trainer.strategy.reduce(buffer.double())  # collective
            buffer.copy_(mean)
