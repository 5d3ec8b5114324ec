"""Stop when a monitored value stops improving."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from logging import getLogger
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .arguments import require_choice, require_int
from .base import Callback
from .monitor import acts_at_epoch_ends, not_logged, worst_value

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class EarlyStoppingReason(Enum):
    """Why :class:`EarlyStopping` ended the training."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """End the training when a monitored value has not improved for some time.

    With several processes, the main process's value counts for all. A run that is resumed from a checkpoint in
    which this callback had already decided to stop ends at once, unless ``patience`` was raised meanwhile.

    Args:
        monitor: name of a logged value.
        min_delta: by how much a value must be better than the best one to count as an improvement.
        patience: how many checks without an improvement end the training; a check takes place after each
            validation, or each epoch (see ``check_on_train_epoch_end``).
        verbose: also say when the value improved.
        mode: ``"min"`` if less is better, ``"max"`` if more is.
        strict: raise if ``monitor`` was not logged when a check is due; otherwise that check is skipped.
        check_finite: stop when the value is NaN or infinite.
        stopping_threshold: stop as soon as the value is better than this.
        divergence_threshold: stop as soon as the value is worse than this.
        check_on_train_epoch_end: check at the end of each epoch (True) or of each validation (False). By default at
            the end of each epoch if validation runs once in every epoch or never, and else after validation.
        log_rank_zero_only: with ``verbose``, let only the main process talk.

    Attributes:
        wait_count: checks since the last improvement.
        best_score: the best value so far, a tensor without dimensions on the CPU.
        stopped_epoch: the epoch in which the training was ended, or 0.
        stopping_reason: an :class:`EarlyStoppingReason`.
        stopping_reason_message: the same in words, or None.

    Raises:
        ValueError: if ``mode`` or ``patience`` is not as above.
        RuntimeError: at a check, if nothing called ``monitor`` was logged and ``strict`` is set.
    """

    phase = "decide"

    mode_dict: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "min": torch.lt,
        "max": torch.gt,
    }
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        require_choice("mode", mode, "min", "max")
        require_int("patience", patience, 0, "a number of checks, an int of at least 0")
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = worst_value(mode)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self._loaded = False

    @property
    def state_key(self) -> str:
        return (
            f"{type(self).__qualname__}[monitor={self.monitor!r}, mode={self.mode!r}]"
        )

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """``monitor_op(a, b)`` tells whether ``a`` is better than ``b``."""
        return self.mode_dict[self.mode]

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state. Its ``patience`` does not count: the constructor's argument is newer."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        # Another trainer's has no reasons.
        reason = state_dict.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED)
        self.stopping_reason = EarlyStoppingReason(reason)
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self._loaded = True

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._loaded:
            return
        self._loaded = False
        was_exhausted = self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
        if was_exhausted and self.wait_count < self.patience:
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info(
                    "EarlyStopping had ended this run before it was resumed: %s",
                    self.stopping_reason_message,
                )

    def _acts_at_epoch_ends(self, trainer: Trainer) -> bool:
        return acts_at_epoch_ends(trainer, self._check_on_train_epoch_end)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        # An epoch that was left before its end is not done: its check comes when the run is resumed.
        if trainer.state.epoch_done and self._acts_at_epoch_ends(trainer):
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        in_epoch = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_epoch and not self._acts_at_epoch_ends(trainer):
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        logged = trainer.callback_metrics
        value = logged.get(self.monitor)
        if value is not None:
            value = value.detach().squeeze().to("cpu", copy=True)
        # All processes go on with the main process's value, so that their counts stay the same.
        value = trainer.strategy.broadcast(value)  # collective
        if value is None:
            missing = not_logged(self, self.monitor, logged)
            if self.strict:
                raise missing
            self._say(trainer, f"{missing} This check is skipped.", is_detail=True)
            return
        reason, message = self._judge(value)
        if reason is EarlyStoppingReason.NOT_STOPPED:
            if message:
                self._say(trainer, message, is_detail=True)
            return
        trainer.should_stop = True
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason = reason
        self.stopping_reason_message = message
        self._say(trainer, f"Stopping: {message}")

    def _judge(self, current: Tensor) -> tuple[EarlyStoppingReason, str]:
        """Compare with the best value and the limits, and update the counts; returns what to do, and what to say."""
        name = self.monitor
        better = self.monitor_op
        value = f"{name} = {current:.6g}"
        best = f"{self.best_score:.6g}"
        if self.check_finite and not torch.isfinite(current):
            message = f"{name} = {current} is not finite; the best was {best}."
            return EarlyStoppingReason.NON_FINITE_METRIC, message
        limit = self.stopping_threshold
        if limit is not None and better(current, limit):
            sign = self.order_dict[self.mode]
            message = f"Stopping threshold reached: {value} {sign} {limit}."
            return EarlyStoppingReason.STOPPING_THRESHOLD, message
        limit = self.divergence_threshold
        if limit is not None and better(-current, -limit):
            message = f"Divergence threshold reached: {value} is worse than {limit}."
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, message

        margin = self.min_delta if self.mode == "min" else -self.min_delta
        if better(current + margin, self.best_score):
            self.best_score = current
            self.wait_count = 0
            message = f"{name} improved from {best} to {current:.6g}."
            return EarlyStoppingReason.NOT_STOPPED, message
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, ""
        message = f"{name} did not improve in the last {self.wait_count} checks; the best was {best}."
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, message

    def _say(self, trainer: Trainer, message: str, is_detail: bool = False) -> None:
        """Tell the user; a detail only if ``verbose`` is set."""
        text = f"EarlyStopping, epoch {trainer.current_epoch}: {message}"
        if trainer.is_global_zero:
            if self.verbose or not is_detail:
                log.info("%s", text)
        elif self.verbose and not self.log_rank_zero_only:
            log.info("[rank %d] %s", trainer.global_rank, text)
