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
from .displays import Bars, Lines, Stretch
from .progress import ProgressBar

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from ..framework import Module, Trainer


@dataclass(frozen=True)
class RichProgressBarTheme:
    """Styles, in rich's syntax, of the parts of :class:`RichProgressBar`."""

    description: str = ""  # what is running
    progress_bar: str = "cyan"  # the part of the bar that is done
    progress_bar_finished: str = "green"  # a full bar
    progress_bar_pulse: str = "cyan"  # the bar when the number of batches is unknown
    batch_progress: str = ""  # batches done and to do
    time: str = "dim"  # elapsed and remaining
    processing_speed: str = "dim"  # batches a second
    metrics: str = "italic"  # logged values
    metrics_text_delimiter: str = " "  # stands between two of them
    metrics_format: str = ".4g"  # how they are formatted, in Python's syntax


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
        self._display: Bars | Lines | None = None  # None: nothing is shown
        self._next_show = (
            math.inf
        )  # on the monotonic clock: all that is looked at after most batches
        self._epoch: Stretch | None = None
        self._evaluation: Stretch | None = None
        self._evaluated = 0  # batches of it, of all loaders

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

        def whole() -> Column:
            return Column(
                no_wrap=True
            )  # in a narrow terminal it is the metrics that go on in the next line

        def text(template: str, style: str, column: Column | None = None) -> TextColumn:
            return TextColumn(
                template,
                style=style or "none",
                markup=False,
                table_column=column or whole(),
            )

        bar = BarColumn(
            bar_width=20 if get_terminal_size().columns >= 110 else 8,
            table_column=whole(),
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        return (
            text("{task.description}", theme.description),
            bar,
            MofNCompleteColumn(table_column=whole()),
            TimeElapsedColumn(table_column=whole()),
            TimeRemainingColumn(table_column=whole()),
            text("{task.fields[speed_text]}", theme.processing_speed),
            text("{task.fields[metrics]}", theme.metrics, Column(ratio=1)),
        )

    # -- training ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        if (
            trainer.batch_idx
        ):  # inside an epoch, which had its start before the run was resumed
            self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        if self.leave:
            self._close()
        elif self._display and self._epoch:
            self._display.remove(self._epoch)
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs - 1}"
        label = f"{self.train_description} {trainer.current_epoch}{last}"
        self._epoch = Stretch(
            label, trainer.num_training_batches, first=trainer.batch_idx
        )
        self._begin(trainer, self._epoch)

    def on_train_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if monotonic() >= self._next_show:
            self._show(trainer, module, self._epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self._show(trainer, module, self._epoch, trainer.batch_idx)

    # -- evaluation -------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        if trainer.sanity_checking:
            self._begin_evaluation(
                trainer, self.sanity_check_description, trainer.num_sanity_val_batches
            )
            return
        if isinstance(self._display, Bars):
            self._show(
                trainer, module, self._epoch, trainer.batch_idx
            )  # it will not move for a while
        self._begin_evaluation(
            trainer, self.validation_description, trainer.num_val_batches
        )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated += 1
        if monotonic() >= self._next_show:
            self._draw(self._evaluation, self._evaluated)

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        in_epoch = trainer.state.fn == "fit" and not trainer.sanity_checking
        # The epoch's line will tell of the validation at its end; one inside it has a line of its own.
        silent = trainer.sanity_checking or (in_epoch and trainer.state.batches_done)
        if in_epoch and self._epoch and self._evaluation:
            self._epoch.paused += self._evaluation.seconds
        self._end_evaluation(
            trainer, module, silent=silent, leave=trainer.state.fn != "fit"
        )

    def on_test_start(self, trainer: Trainer, module: Module) -> None:
        self._begin_evaluation(trainer, self.test_description, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, module: Module) -> None:
        self._begin_evaluation(
            trainer, self.predict_description, trainer.num_predict_batches
        )

    def on_test_end(self, trainer: Trainer, module: Module) -> None:
        self._end_evaluation(trainer, module)

    on_predict_end = on_test_end
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _begin_evaluation(
        self, trainer: Trainer, label: str, limits: list[int | float]
    ) -> None:
        self._evaluation, self._evaluated = Stretch(label, sum(limits)), 0
        self._begin(trainer, self._evaluation)

    def _end_evaluation(
        self, trainer: Trainer, module: Module, silent: bool = False, leave: bool = True
    ) -> None:
        if self._display is None or self._evaluation is None:
            return
        if not leave:
            self._display.remove(self._evaluation)
        if not silent and (leave or isinstance(self._display, Lines)):
            self._show(trainer, module, self._evaluation, self._evaluated)
        self._evaluation = None

    # -- the end ----------------------------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, module: Module, exception: BaseException
    ) -> None:
        self._close()

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
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

    # -- drawing ----------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, stretch: Stretch) -> None:
        if not self.is_enabled:
            return
        if self._display is None:
            self._display = self._open(trainer)
        self._display.begin(stretch)
        self._next_show = monotonic() + self._display.interval

    def _show(
        self, trainer: Trainer, module: Module, stretch: Stretch | None, done: int
    ) -> None:
        """Draw with the logged values, which waits for the device."""
        if self._display is None or not self.is_enabled:
            return
        theme = self.theme
        metrics = theme.metrics_text_delimiter.join(
            f"{name}: {value if isinstance(value, str) else format(value, theme.metrics_format)}"
            for name, value in self.get_metrics(trainer, module).items()
        )
        self._draw(stretch, done, metrics)

    def _draw(self, stretch: Stretch | None, done: int, metrics: str = "") -> None:
        if self._display is None or stretch is None or not self.is_enabled:
            return
        self._display.show(stretch, done, metrics)
        self._next_show = monotonic() + self._display.interval

    def _open(self, trainer: Trainer) -> Bars | Lines:
        from rich.console import Console
        from rich.progress import Progress
        from rich.theme import Theme

        theme = self.theme  # of parts that know their style by name only
        styles = {
            "progress.download": theme.batch_progress,
            "progress.elapsed": theme.time,
        }
        styles["progress.remaining"] = theme.time
        console = Console(**{"theme": Theme(styles), **self._console_kwargs})
        in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
        # With FORCE_COLOR, which many CI systems set, rich takes a file for a terminal: each drawing would be a line.
        forced = self._console_kwargs.keys() & {"force_terminal", "force_interactive"}
        in_terminal = console.is_interactive and (
            forced or getattr(console.file, "isatty", bool)()
        )
        if not (in_terminal or in_notebook):
            return Lines(console)
        progress = Progress(
            *self.configure_columns(trainer), console=console, auto_refresh=False
        )
        return Bars(progress, 1 / self.refresh_rate)

    def _close(self) -> None:
        """Give the terminal back."""
        self._next_show = math.inf
        display, self._display, self._epoch, self._evaluation = (
            self._display,
            None,
            None,
            None,
        )
        if display is not None:
            display.close()
