"""Where the time of a run goes: each moment belongs to one phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

PHASES: tuple[str, ...] = (
    "data_wait",
    "transfer",
    "step",
    "callbacks",
    "validation",
    "checkpoint",
    "other",
)


class Clock:
    """Adds up the seconds of each phase.

    A switch takes about 0.2 µs, and a step has three.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = perf_counter()
        self._before_epoch = dict(self.seconds)

    def begin(self) -> None:
        """A run begins: what has passed since the last one does not count."""
        self._since = perf_counter()
        self._phase = "other"

    def reset(self) -> None:
        """Nothing has passed yet of the run that is measured next."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._before_epoch = dict(self.seconds)

    def so_far(self) -> dict[str, float]:
        """Seconds by phase until now, for another thread than the run's."""
        seconds = dict(self.seconds)
        phase = self._phase
        seconds[phase] += perf_counter() - self._since
        return seconds

    def switch(self, phase: str) -> None:
        """From now on, it is this phase."""
        now = perf_counter()
        self.seconds[self._phase] += now - self._since
        self._since = now
        self._phase = phase

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """This phase inside of another one."""
        outer = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(outer)

    def timed_transfer(
        self, transfer: Callable[[Any, int], Any]
    ) -> Callable[[Any, int], Any]:
        """Return what moves a batch as ``transfer`` does."""

        def timed(batch: Any, dataloader_idx: int) -> Any:
            self.switch("transfer")
            moved = transfer(batch, dataloader_idx)
            self.switch("data_wait")
            return moved

        return timed

    def now(self) -> dict[str, float]:
        """Seconds by phase until now."""
        self.switch(self._phase)
        return dict(self.seconds)

    def end_epoch(self) -> dict[str, float]:
        """Seconds by phase since the last epoch's end."""
        now = self.now()
        of_epoch = {phase: now[phase] - self._before_epoch[phase] for phase in PHASES}
        self._before_epoch = now
        return of_epoch

    def state(self) -> dict[str, Any]:
        """What a run that goes on from here counts on from."""
        return {"run": self.now(), "before_epoch": dict(self._before_epoch)}

    def go_on(self, state: dict[str, Any]) -> None:
        """Count on from :meth:`state`."""
        for phase in PHASES:
            self.seconds[phase] = state["run"].get(phase, 0.0)
            self._before_epoch[phase] = state["before_epoch"].get(phase, 0.0)
        self._since = perf_counter()
