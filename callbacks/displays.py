"""Where progress is shown: as bars in a terminal or notebook, or as lines of text anywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@dataclass
class Stretch:
    """An epoch or an evaluation that is under way."""

    label: str  # what it is called
    total: float  # batches, as far as is known; infinite if it is not
    first: int = (
        0  # batches that were done before, in the run that this one goes on from
    )
    began: float = field(
        default_factory=monotonic
    )  # on the monotonic clock, in seconds
    paused: float = 0.0  # seconds that something else took meanwhile
    bar: TaskID | None = None  # its bar, if there are bars

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return monotonic() - self.began

    def speed(self, done: int) -> str:
        """Batches a second, or seconds a batch, after ``done`` of them."""
        seconds, batches = self.seconds - self.paused, done - self.first
        if batches <= 0 or seconds <= 0:
            return ""
        return (
            f"{batches / seconds:.1f} it/s"
            if batches >= seconds
            else f"{seconds / batches:.2f} s/it"
        )


class Bars:
    """Bars of rich that stay at the bottom of the screen.

    Args:
        progress: made with ``auto_refresh=False``: it is drawn by whoever calls these methods, not by a thread.
        interval: seconds between two drawings.
    """

    def __init__(self, progress: Progress, interval: float) -> None:
        self.interval = interval
        self._progress = progress
        progress.start()

    def begin(self, stretch: Stretch) -> None:
        """Add a bar."""
        total = stretch.total if stretch.first <= stretch.total < math.inf else None
        stretch.bar = self._progress.add_task(
            stretch.label,
            total=total,
            completed=stretch.first,
            speed_text="",
            metrics="",
        )
        self._progress.refresh()

    def show(self, stretch: Stretch, done: int, metrics: str) -> None:
        """Draw how far it is."""
        assert stretch.bar is not None
        if done > stretch.total:
            for task in self._progress.tasks:
                if task.id == stretch.bar:
                    task.total = None  # update() takes None for "as it was"
        self._progress.update(
            stretch.bar, completed=done, speed_text=stretch.speed(done), metrics=metrics
        )
        self._progress.refresh()

    def remove(self, stretch: Stretch) -> None:
        """Take the bar off the screen."""
        assert stretch.bar is not None
        self._progress.remove_task(stretch.bar)
        self._progress.refresh()

    def close(self) -> None:
        """Leave the bars on the screen as they are, and give the terminal back."""
        self._progress.stop()


class Lines:
    """One line of text at the end of each stretch, and now and then in long ones.

    Args:
        console: whose file is written to.
    """

    interval = 60.0  # seconds

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, stretch: Stretch) -> None:
        """Nothing is shown before something is done."""

    def show(self, stretch: Stretch, done: int, metrics: str) -> None:
        """Print how far it is."""
        batches = (
            f"{done}/{stretch.total}" if done <= stretch.total < math.inf else f"{done}"
        )
        parts = (
            f"{stretch.label}: {batches} batches in {stretch.seconds:.1f} s",
            stretch.speed(done),
            metrics,
        )
        # By print, as the console would break lines at a width that is not that of the file.
        print(", ".join(filter(None, parts)), file=self._console.file, flush=True)

    def remove(self, stretch: Stretch) -> None:
        """Lines stay."""

    def close(self) -> None:
        """There is nothing to give back."""
