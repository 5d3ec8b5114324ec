"""Progress bars in the terminal, by rich; plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import get_terminal_size
from time import monotonic
from typing import TYPE_CHECKING, Any

from .arguments import require
from .displays import BarDisplay, LineDisplay, ProgressTask
from .progress import ProgressBar

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from ..framework import Module, Trainer


@dataclass(frozen=True)
class RichProgressBarTheme:
    """How the parts of :class:`RichProgressBar` look. Styles are in rich's syntax.

    Args:
        description: style of the name of what is running.
        progress_bar: style of the part of the bar that is done.
        progress_bar_finished: style of a full bar.
        progress_bar_pulse: style of the bar when the number of batches is unknown.
        batch_progress: style of the numbers of batches done and to do.
        time: style of the elapsed and the remaining time.
        processing_speed: style of the speed, in batches a second.
        metrics: style of the logged values.
        metrics_text_delimiter: text between two of them.
        metrics_format: how they are formatted, in Python's syntax.
    """

    description: str = ""
    progress_bar: str = "cyan"
    progress_bar_finished: str = "green"
    progress_bar_pulse: str = "cyan"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".4g"


class RichProgressBar(ProgressBar):
    """Show how far a run is: the epoch, batches, speed, time and logged values.

    The bar is drawn by the training process itself, at most ``refresh_rate`` times a second; no thread runs, and
    values are read from the device only then. ``print`` may be used meanwhile. Where standard output is no
    terminal, a plain line is printed for each epoch and each evaluation instead, and one a minute in long ones.

    Args:
        refresh_rate: how often to draw, at most, in times a second; 0 shows nothing.
        leave: leave each epoch's bar on the screen.
        theme: colours and formats.
        console_kwargs: arguments for ``rich.console.Console``.

    Raises:
        ValueError: if ``refresh_rate`` is negative.
    """

    def __init__(
        self,
        refresh_rate: float = 10,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require(
            refresh_rate >= 0,
            "refresh_rate",
            "a number of times a second, 0 or more",
            refresh_rate,
        )
        super().__init__()
        self.refresh_rate = refresh_rate
        self.leave = leave
        self.theme = theme or RichProgressBarTheme()
        self._console_kwargs = console_kwargs or {}
        # None while nothing is shown.
        self._display: BarDisplay | LineDisplay | None = None
        # When to draw again, on the monotonic clock: after most batches, nothing else is looked at.
        self._next_show = math.inf
        self._epoch: ProgressTask | None = None
        self._evaluation: ProgressTask | None = None
        # Batches of the evaluation that are done, of all loaders.
        self._evaluated = 0

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and self.refresh_rate > 0

    def configure_columns(self, trainer: Trainer) -> Sequence[ProgressColumn]:
        """The parts of a bar; override it to show others. Tasks have the fields ``speed_text`` and ``metrics``."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        theme = self.theme

        # In a narrow terminal it is the metrics that go on in the next line.
        whole = Column(no_wrap=True)

        def text(template: str, style: str, column: Column) -> TextColumn:
            return TextColumn(
                template,
                style=style or "none",
                markup=False,
                table_column=column,
            )

        bar = BarColumn(
            bar_width=20 if get_terminal_size().columns >= 110 else 8,
            table_column=whole,
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        return (
            text("{task.description}", theme.description, whole),
            bar,
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            text("{task.fields[speed_text]}", theme.processing_speed, whole),
            text("{task.fields[metrics]}", theme.metrics, Column(ratio=1)),
        )

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        # Inside an epoch, which had its start before the run was resumed.
        if trainer.batch_idx:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.leave:
            self._close()
        elif self._display and self._epoch:
            self._display.remove(self._epoch)
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs - 1}"
        label = f"{self.train_description} {trainer.current_epoch}{last}"
        self._epoch = ProgressTask(
            label,
            trainer.num_training_batches,
            first=trainer.batch_idx,
        )
        self._begin(trainer, self._epoch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if monotonic() >= self._next_show:
            self._show(trainer, pl_module, self._epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._show(trainer, pl_module, self._epoch, trainer.batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.sanity_checking:
            label = self.sanity_check_description
            self._begin_evaluation(trainer, label, trainer.num_sanity_val_batches)
            return
        if self._display is not None and self._display.is_live:
            # The epoch's bar will not move for a while.
            self._show(trainer, pl_module, self._epoch, trainer.batch_idx)
        label = self.validation_description
        self._begin_evaluation(trainer, label, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin_evaluation(trainer, self.test_description, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        label = self.predict_description
        self._begin_evaluation(trainer, label, trainer.num_predict_batches)

    def _begin_evaluation(
        self,
        trainer: Trainer,
        label: str,
        num_batches: list[int | float],
    ) -> None:
        self._evaluation = ProgressTask(label, sum(num_batches))
        self._evaluated = 0
        self._begin(trainer, self._evaluation)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated += 1
        if monotonic() >= self._next_show:
            self._draw(self._evaluation, self._evaluated)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        evaluation = self._evaluation
        display = self._display
        if evaluation is None or display is None:
            return
        shows_result = True
        if trainer.state.fn == "fit":
            # A line of its own is for a validation inside an epoch: the epoch's line tells of the one at its end.
            in_epoch = not trainer.sanity_checking and not trainer.state.batches_done
            shows_result = in_epoch and not display.is_live
            display.remove(evaluation)
            if self._epoch is not None:
                self._epoch.pause(evaluation.seconds)
        if shows_result:
            self._show(trainer, pl_module, evaluation, self._evaluated)
        self._evaluation = None

    on_test_end = on_predict_end = on_validation_end
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: Module,
        exception: BaseException,
    ) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # A terminal can be neither copied nor sent to another process.
        return {
            **super().__getstate__(),
            "_display": None,
            "_epoch": None,
            "_evaluation": None,
            "_next_show": math.inf,
        }

    def _begin(self, trainer: Trainer, task: ProgressTask) -> None:
        if not self.is_enabled:
            return
        if self._display is None:
            self._display = self._open(trainer)
        self._display.begin(task)
        self._next_show = monotonic() + self._display.interval

    def _show(
        self,
        trainer: Trainer,
        pl_module: Module,
        task: ProgressTask | None,
        done: int,
    ) -> None:
        """Draw with the logged values, which waits for the device."""
        if self._display is None or not self.is_enabled:
            return
        theme = self.theme
        metrics = []
        for name, value in self.get_metrics(trainer, pl_module).items():
            if not isinstance(value, str):
                value = format(value, theme.metrics_format)
            metrics.append(f"{name}: {value}")
        self._draw(task, done, theme.metrics_text_delimiter.join(metrics))

    def _draw(self, task: ProgressTask | None, done: int, metrics: str = "") -> None:
        if self._display is None or task is None or not self.is_enabled:
            return
        self._display.show(task, done, metrics)
        self._next_show = monotonic() + self._display.interval

    def _open(self, trainer: Trainer) -> BarDisplay | LineDisplay:
        from rich.console import Console
        from rich.progress import Progress
        from rich.theme import Theme

        # The styles of those parts of a bar that know their style by name only.
        styles = {
            "progress.download": self.theme.batch_progress,
            "progress.elapsed": self.theme.time,
            "progress.remaining": self.theme.time,
        }
        console = Console(**{"theme": Theme(styles), **self._console_kwargs})
        in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
        # With FORCE_COLOR, which many CI systems set, rich takes a file for a terminal: each drawing would be a line.
        forced = self._console_kwargs.keys() & {"force_terminal", "force_interactive"}
        is_terminal = forced or getattr(console.file, "isatty", bool)()
        if not in_notebook and not (console.is_interactive and is_terminal):
            return LineDisplay(console)
        columns = self.configure_columns(trainer)
        progress = Progress(*columns, console=console, auto_refresh=False)
        return BarDisplay(progress, 1 / self.refresh_rate)

    def _close(self) -> None:
        """Give the terminal back."""
        if self._display is not None:
            self._display.close()
        self._display = self._epoch = self._evaluation = None
        self._next_show = math.inf
