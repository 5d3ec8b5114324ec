"""Where progress is shown: as bars in a terminal or notebook, or as lines of text anywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclass
class ProgressTask:
    """An epoch or an evaluation that is under way.

    Attributes:
        label: what it is called.
        total: batches, as far as is known; infinite if it is not.
        first: batches that were done before, in the run that this one was resumed from.
        start: when it began, on the monotonic clock, in seconds.
        paused_seconds: time in it that something else took.
        bar: rich's number of its bar, if there are bars.
    """

    label: str
    total: float
    first: int = 0
    start: float = field(default_factory=monotonic)
    paused_seconds: float = 0.0
    bar: Any = None

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return monotonic() - self.start

    def pause(self, seconds: float) -> None:
        """Leave so much time out of the speed."""
        self.paused_seconds += seconds

    def speed(self, done: int) -> str:
        """Batches a second, or seconds a batch, after ``done`` of them."""
        seconds = self.seconds - self.paused_seconds
        batches = done - self.first
        if batches <= 0 or seconds <= 0:
            return ""
        if batches >= seconds:
            return f"{batches / seconds:.1f} it/s"
        return f"{seconds / batches:.2f} s/it"


class BarDisplay:
    """Shows progress in bars of rich that stay at the bottom of the screen.

    Args:
        progress: made with ``auto_refresh=False``: it is drawn by whoever calls these methods, not by a thread.
        interval: seconds between two drawings.
    """

    is_live = True

    def __init__(self, progress: Progress, interval: float) -> None:
        self.interval = interval
        self._progress = progress
        progress.start()

    def begin(self, task: ProgressTask) -> None:
        """Add a bar."""
        total = task.total if task.first <= task.total < math.inf else None
        task.bar = self._progress.add_task(
            task.label,
            total=total,
            completed=task.first,
            speed_text="",
            metrics="",
        )
        self._progress.refresh()

    def show(self, task: ProgressTask, done: int, metrics: str) -> None:
        """Draw how far it is, in batches that are done."""
        if done > task.total:
            for shown in self._progress.tasks:
                if shown.id == task.bar:
                    # update() takes None for "as it was".
                    shown.total = None
        speed = task.speed(done)
        self._progress.update(
            task.bar,
            completed=done,
            speed_text=speed,
            metrics=metrics,
        )
        self._progress.refresh()

    def remove(self, task: ProgressTask) -> None:
        """Take the bar off the screen."""
        self._progress.remove_task(task.bar)
        self._progress.refresh()

    def close(self) -> None:
        """Leave the bars on the screen as they are, and give the terminal back."""
        self._progress.stop()


class LineDisplay:
    """Shows progress in a line of text at the end of each task, and now and then in long ones.

    Args:
        console: whose file is written to.
    """

    is_live = False
    interval = 60.0  # seconds

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, task: ProgressTask) -> None:
        """Nothing is shown before something is done."""

    def show(self, task: ProgressTask, done: int, metrics: str) -> None:
        """Print how far it is, in batches that are done."""
        total = f"/{task.total}" if done <= task.total < math.inf else ""
        batches = f"{task.label}: {done}{total} batches in {task.seconds:.1f} s"
        parts = filter(None, (batches, task.speed(done), metrics))
        # By print, as the console would break lines at a width that is not that of the file.
        print(", ".join(parts), file=self._console.file, flush=True)

    def remove(self, task: ProgressTask) -> None:
        """Lines stay."""

    def close(self) -> None:
        """There is nothing to give back."""
