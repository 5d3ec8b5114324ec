"""A time interval on the Trainer's clock, whose end all processes see at the same step."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta


class Interval:
    """Says every so often that the time has come again.

    Args:
        duration: from one time to the next.
    """

    def __init__(self, duration: timedelta) -> None:
        self._seconds = duration.total_seconds()
        self._before = 0.0  # seconds that had passed when the clock was started
        self._clock: Callable[[], float] | None = None
        self._start = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the last time, for a checkpoint; set it before :meth:`start` to go on from there."""
        return (
            self._before
            if self._clock is None
            else self._before + self._clock() - self._start
        )

    @elapsed.setter
    def elapsed(self, seconds: float) -> None:
        self._before, self._clock = seconds, None

    def start(self, clock: Callable[[], float]) -> None:
        """Go on by this clock, in seconds."""
        self._before = (
            0.0 if self._clock is not None else self._before
        )  # another run begins anew
        self._clock, self._start = clock, clock()

    def is_over(self) -> bool:
        """Whether the time has come; if so, the next interval begins."""
        over = self.elapsed >= self._seconds
        if over and self._clock is not None:
            self._before, self._start = 0.0, self._clock()
        return over
