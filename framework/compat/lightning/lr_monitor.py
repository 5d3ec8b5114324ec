"""Lightning's LearningRateMonitor: what can be read of it, on Loopwright's."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from ....callbacks import LearningRateMonitor as NativeLearningRateMonitor
from ....callbacks.lr_monitor import groups_by_name, optimizers_by_name
from .utilities import MisconfigurationException, MisconfiguredValue

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(NativeLearningRateMonitor):
    """A :class:`~loopwright.callbacks.LearningRateMonitor`, with the same arguments.

    Attributes:
        last_momentum_values: the momentum of each group that was logged last, by name; None where it is not logged.
        last_weight_decay_values: the same of the weight decay.

    Raises:
        MisconfigurationException: if ``logging_interval`` is not one of those; when training starts, if the Trainer has
            no logger, or two groups of one optimizer have the same name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfiguredValue(
                f"logging_interval should be `step` or `epoch` or `None`; got {logging_interval!r}"
            )
        super().__init__(logging_interval, log_momentum, log_weight_decay)
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "LearningRateMonitor cannot log with a `Trainer` that has no logger: pass one as logger=…"
            )
        super().on_train_start(trainer, pl_module)
        groups = _groups(trainer)
        if self.log_momentum and not all(map(_has_momentum, groups.values())):
            warnings.warn(
                "log_momentum=True, and some optimizers do not have momentum. 0 is logged for it.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._note_last(groups)

    def _log(self, trainer: Any, interval: str, step: int) -> None:
        groups = _groups(trainer)
        for name in [*self.lrs]:
            first = f"{name}/pg1"
            # The optimizer's only group is the first of several now.
            if name not in groups and first in groups:
                self.lrs[first] = self.lrs.pop(name)
        self._note_last(groups)
        super()._log(trainer, interval, step)

    def _note_last(self, groups: dict[str, dict[str, Any]]) -> None:
        for name, group in groups.items():
            first_beta, *_ = group.get("betas", (group.get("momentum", 0.0),))
            momentum = first_beta if self.log_momentum else None
            decay = group.get("weight_decay", 0.0) if self.log_weight_decay else None
            self.last_momentum_values[f"{name}-momentum"] = momentum
            self.last_weight_decay_values[f"{name}-weight_decay"] = decay


def _has_momentum(group: dict[str, Any]) -> bool:
    return "momentum" in group or "betas" in group


def _groups(trainer: Any) -> dict[str, dict[str, Any]]:
    """The parameter groups of all optimizers, by the name that their learning rate has.

    Raises:
        MisconfigurationException: if two groups of one optimizer have the same name.
    """
    groups = {}
    for name, optimizer, _ in optimizers_by_name(trainer):
        try:
            groups.update(groups_by_name(name, optimizer))
        except ValueError as error:
            raise MisconfiguredValue(
                f"A single `Optimizer` cannot have multiple parameter groups with identical `name` values: {error}"
            ) from None
    return groups
