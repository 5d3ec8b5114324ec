"""Lightning's EarlyStopping: its names and what subclasses of it override, on Loopwright's."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ....callbacks import EarlyStopping as NativeEarlyStopping
from ....callbacks.early_stopping import EarlyStoppingReason
from ....callbacks.monitor import not_logged
from .model_checkpoint import key_of, require_mode

__all__ = ["EarlyStopping", "EarlyStoppingReason", "log"]

log = logging.getLogger("loopwright")


class EarlyStopping(NativeEarlyStopping):
    """A :class:`~loopwright.callbacks.EarlyStopping`, with the same arguments.

    A subclass may override ``_run_early_stopping_check(trainer)``, or call it in another hook, and
    ``_evaluate_stopping_criteria(current)``, which returns whether to stop, and why.

    Raises:
        MisconfigurationException: if ``mode`` is neither ``"min"`` nor ``"max"``.
    """

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
        require_mode(mode)
        super().__init__(
            monitor,
            min_delta,
            patience,
            verbose,
            mode,
            strict,
            check_finite,
            stopping_threshold,
            divergence_threshold,
            check_on_train_epoch_end,
            log_rank_zero_only,
        )
        # What the last check of the usual criteria has found.
        self._found = EarlyStoppingReason.NOT_STOPPED

    @property
    def state_key(self) -> str:
        return key_of(self, monitor=self.monitor, mode=self.mode)

    def _check(self, trainer: Any) -> None:
        self._run_early_stopping_check(trainer)

    def _run_early_stopping_check(self, trainer: Any) -> None:
        try:
            super()._check(trainer)
        except RuntimeError as error:
            missing = not_logged(self, self.monitor, trainer.callback_metrics)
            if str(error) != str(missing):
                raise
            raise RuntimeError(
                f"Early stopping conditioned on metric `{self.monitor}` which is not available. {error}"
            ) from None

    def _judge(self, current: Tensor) -> tuple[EarlyStoppingReason, str]:
        self._found = EarlyStoppingReason.NOT_STOPPED
        should_stop, message = self._evaluate_stopping_criteria(current)
        if not should_stop:
            return EarlyStoppingReason.NOT_STOPPED, message
        if self._found is EarlyStoppingReason.NOT_STOPPED:
            # Criteria of a subclass give no reason of this kind.
            return EarlyStoppingReason.PATIENCE_EXHAUSTED, message
        return self._found, message

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str]:
        self._found, message = super()._judge(current)
        return self._found is not EarlyStoppingReason.NOT_STOPPED, message

    def _say(self, trainer: Any, message: str, is_detail: bool = False) -> None:
        is_main = trainer.is_global_zero
        if self.verbose or (is_main and not is_detail):
            text = f"EarlyStopping, epoch {trainer.current_epoch}: {message}"
            self._log_info(trainer, text, self.log_rank_zero_only)

    @staticmethod
    def _log_info(trainer: Any, message: str, log_rank_zero_only: bool) -> None:
        """Log a message, with the process's number where there are several."""
        rank = trainer.global_rank
        if trainer.world_size > 1:
            message = f"[rank: {rank}] {message}"
        if rank == 0 or not log_rank_zero_only:
            log.info(message)
