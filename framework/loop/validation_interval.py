"""When a validation is due whose interval is not one of batches: by optimizer steps, tokens or time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...callbacks.intervals import Interval
from ..checkpoint.schema import ValidationMark
from ..data.iteration import INFINITE

if TYPE_CHECKING:
    from .run import Run


class ValidationInterval:
    """Makes a validation due at the end of the accumulation window in which the interval is over.

    Steps and tokens are counted from the beginning of the training: with ``"500 steps"``, it is due after the steps
    500, 1000 and so on. A time is counted from the last validation.

    Args:
        run: the fit.
        interval: its interval, in steps, tokens or seconds.
    """

    def __init__(self, run: Run, interval: Interval) -> None:
        self.run = run
        self.interval = interval
        # At how many steps, tokens, or seconds on the run's clock, the next validation is due; None until it begins.
        self._mark: float | None = None
        # The batch that was looked at last, counted over the run, and what came of it, as a clock may go on meanwhile.
        self._looked_at = -1
        self._is_due = False

    def begin_epoch(self) -> None:
        """Go on where the run that is resumed has stopped, or begin."""
        if self._mark is not None:
            return
        saved = self.run.state.validation
        if saved is None or saved["interval"] != str(self.interval):
            self._set_mark()
        elif self.interval.unit == "seconds":
            self._set_mark(passed=saved["mark"])
        else:
            self._mark = saved["mark"]

    def _set_mark(self, passed: float = 0.0) -> None:
        """Let the next validation be due after the whole interval, or what is left of it."""
        amount = self.interval.amount
        state = self.run.state
        if self.interval.unit == "steps":
            self._mark = (state.global_step // amount + 1) * amount
        elif self.interval.unit == "tokens":
            self._mark = state.tokens.next_multiple(amount)
        else:
            self._mark = self.run.consensus.clock() + amount - passed

    def was_due(self) -> bool:
        """Whether the run that is resumed was saved right before a validation."""
        return self.run.state.batch_idx > 0 and self.is_due()

    def is_due(self) -> bool:
        """Whether to validate after the batch that has just ended. For tokens, sometimes a host–device sync."""
        batch = self.run.state.total_batches
        if self._looked_at != batch:
            self._looked_at = batch
            may_be = self.run.trainer.enable_validation and not self.run.window_is_open
            self._is_due = may_be and self._is_over()
        return self._is_due

    def _is_over(self) -> bool:
        state = self.run.state
        assert self._mark is not None
        if self.interval.unit == "steps":
            return state.global_step >= self._mark
        if self.interval.unit == "tokens":
            return state.tokens.has_reached(self._mark, state.global_step)
        return self.run.consensus.clock() >= self._mark

    @property
    def num_batches(self) -> int | float:
        """After how many batches it may be due, at the earliest."""
        if not self.run.trainer.enable_validation:
            return INFINITE
        if self.interval.unit == "steps" and self._mark is not None:
            # A batch takes one optimizer step at most.
            return max(1, self._mark - self.run.state.global_step)
        if self.interval.unit == "seconds" and self.run.engine.num_processes > 1:
            # Several ranks know the time from their agreements.
            return INFINITE
        return 1

    def begin_anew(self) -> None:
        """A validation has ended."""
        self._set_mark()
        self._is_due = False

    def state(self) -> ValidationMark | None:
        """Where the interval stands, for :meth:`begin_epoch` of a run that resumes this one."""
        if self._mark is None:
            return self.run.state.validation
        mark = self._mark
        if self.interval.unit == "seconds":
            mark = self.interval.amount - (mark - self.run.consensus.clock())
        return {"interval": str(self.interval), "mark": mark}
