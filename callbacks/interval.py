"""A time interval of which all processes learn the end at the same step."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..framework import Trainer


class Interval:
    """Says every so often, in training steps, that the time has come again; the main process's clock decides.

    Several processes ask each other about once a second only: the main process tells after how many steps to look
    at its clock again.

    Args:
        duration: from one time to the next.

    Attributes:
        elapsed: seconds since the last time, for a checkpoint; set it before :meth:`start` to go on from there.
    """

    def __init__(self, duration: timedelta) -> None:
        self._seconds = duration.total_seconds()
        self._before = 0.0  # seconds that had passed when the run was resumed
        self._start: float | None = None
        self._looked = (0, 0.0)  # the step and the time of the last look at the clock
        self._next_look = 0

    @property
    def elapsed(self) -> float:
        return self._before if self._start is None else time.monotonic() - self._start

    @elapsed.setter
    def elapsed(self, seconds: float) -> None:
        self._before, self._start = seconds, None

    def start(self, step: int) -> None:
        """Let the clock run; ``step`` is the last one that is done."""
        now = time.monotonic()
        self._start, self._before = now - self._before, 0.0
        self._looked, self._next_look = (step, now), step

    def is_over(self, trainer: Trainer) -> bool:
        """Whether the time has come; if so, the next interval begins."""
        step = trainer.global_step
        if step < self._next_look:
            return False
        left = self._seconds - self.elapsed
        over = left <= 0
        if trainer.world_size > 1:
            now = time.monotonic()
            steps, seconds = step - self._looked[0], max(now - self._looked[1], 1e-6)
            wait = steps / seconds * min(1.0, left if left > 0 else self._seconds)
            self._looked = step, now
            # At most twice as far as the last time, as the first steps tell little about the speed.
            next_look = step + max(1, min(int(wait), 2 * steps))
            over, self._next_look = trainer.strategy.broadcast((over, next_look))  # a collective
        if over:
            self._start = time.monotonic()
        return over
