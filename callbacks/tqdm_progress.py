"""Progress bars of tqdm, with the methods that programs override."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .progress import ProgressBar

if TYPE_CHECKING:
    from tqdm import tqdm

# By the stage of an evaluation: the method that makes its bar, and the Trainer's number of its batches.
_EVALUATIONS = {
    "sanity_check": ("init_sanity_tqdm", "num_sanity_val_batches"),
    "validate": ("init_validation_tqdm", "num_val_batches"),
    "test": ("init_test_tqdm", "num_test_batches"),
    "predict": ("init_predict_tqdm", "num_predict_batches"),
}

# Seconds from one drawing to the next, at least.
_INTERVAL = 0.1


def convert_inf(count: Any) -> int | None:
    """A number of batches for tqdm, which takes None for one that is not known."""
    if count is None or count in (float("inf"), float("nan")):
        return None
    return int(count)


def Tqdm(**options: Any) -> tqdm[Any]:  # noqa: N802 # Lightning's name
    """A bar of tqdm, in a notebook one of its widgets; arguments as of ``tqdm.tqdm``.

    Raises:
        ImportError: if tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "TQDMProgressBar needs tqdm: pip install 'loopwright[tqdm]'; or use RichProgressBar"
        ) from error
    return tqdm(**options)


class TQDMProgressBar(ProgressBar):
    """Show how far a run is by bars of tqdm: one for the epoch, and one for an evaluation.

    Override :meth:`init_train_tqdm` and its siblings for bars of your own. Needs tqdm
    (``pip install 'loopwright[tqdm]'``).

    Args:
        refresh_rate: after how many batches to draw, though not more often than ten times a second; 0 shows nothing.
        process_position: how many lines below the first bars are drawn.
        leave: leave each epoch's bar on the screen.

    Attributes:
        train_progress_bar, val_progress_bar, test_progress_bar, predict_progress_bar: the bars, while they are there.
        val_sanity_check_bar: that of the sanity check.

    Raises:
        ImportError: when the first bar is made, if tqdm is not installed.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(
        self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False
    ) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._process_position = process_position
        self._leave = leave
        self._bars: dict[str, Any] = {}
        self._evaluated = 0
        # When bars may be drawn again, on the monotonic clock.
        self._next_drawing = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Bars belong to a terminal.
        return {**super().__getstate__(), "_bars": {}}

    @property
    def refresh_rate(self) -> int:
        """After how many batches to draw."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """How many lines below the first bars are drawn."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn."""
        return super().is_enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether no bars are drawn."""
        return not self.is_enabled

    def _bar(self, stage: str) -> Any:
        if stage not in self._bars:
            raise TypeError(f"{type(self).__name__} has no bar of {stage} yet")
        return self._bars[stage]

    @property
    def train_progress_bar(self) -> Any:
        """The epoch's bar."""
        return self._bar("train")

    @property
    def val_sanity_check_bar(self) -> Any:
        """The bar of the sanity check."""
        return self._bar("sanity_check")

    @property
    def val_progress_bar(self) -> Any:
        """The bar of a validation."""
        return self._bar("validate")

    @property
    def test_progress_bar(self) -> Any:
        """The bar of a test."""
        return self._bar("test")

    @property
    def predict_progress_bar(self) -> Any:
        """The bar of a prediction."""
        return self._bar("predict")

    # The bars.

    def init_sanity_tqdm(self) -> Any:
        """Make the bar of the sanity check."""
        return self._made(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        """Make the bar of an epoch."""
        return self._made(self.train_description, leave=True, smoothing=0)

    def init_validation_tqdm(self) -> Any:
        """Make the bar of a validation."""
        # Inside fit, it is drawn below the epoch's.
        inside = self.trainer.state.fn == "fit"
        description = self.validation_description
        return self._made(description, leave=not inside, lines=int(inside))

    def init_test_tqdm(self) -> Any:
        """Make the bar of a test."""
        return self._made(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Any:
        """Make the bar of a prediction."""
        return self._made(self.predict_description, leave=True, smoothing=0)

    def _made(self, description: str, lines: int = 0, **options: Any) -> Any:
        return Tqdm(
            desc=description,
            position=2 * self.process_position + lines,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
            **options,
        )

    # The run.

    def _begin(self, stage: str, make: Callable[[], Any]) -> None:
        if self.is_enabled:
            self._bars[stage] = make()

    def _show(self, stage: str, done: int) -> Any:
        """Let a bar tell how many batches are done, if it is due; returns the bar if it is to be drawn, too."""
        bar = self._bars.get(stage)
        if bar is None or bar.disable:
            return None
        is_last = done == bar.total
        if done % self._refresh_rate and not is_last:
            return None
        bar.n = done
        now = time.monotonic()
        if now < self._next_drawing and not is_last:
            return None
        self._next_drawing = now + _INTERVAL
        return bar

    def _end(self, stage: str) -> None:
        bar = self._bars.pop(stage, None)
        if bar is not None:
            bar.close()

    def on_train_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        self._begin("train", self.init_train_tqdm)
        # An epoch that a resumed run goes on with has no start of its own.
        self._begin_epoch(trainer)

    def on_train_epoch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        if self._leave and trainer.current_epoch > 0:
            self._end("train")
            self._begin("train", self.init_train_tqdm)
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Any) -> None:
        bar = self._bars.get("train")
        if bar is not None:
            bar.reset(convert_inf(trainer.num_training_batches))
            # The speed is that of the batches from here on.
            bar.initial = trainer.batch_idx
            bar.set_description(f"{self.train_description} {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._show("train", batch_idx + 1) is not None:
            self._show_values(trainer, pl_module)

    def _show_values(self, trainer: Any, pl_module: Any) -> None:
        bar = self._bars.get("train")
        if bar is not None:
            # A host–device sync, and the drawing.
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    on_train_epoch_end = _show_values

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end("train")

    def _on_evaluation_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        stage = str(trainer.state.stage)
        make, batches = _EVALUATIONS[stage]
        self._evaluated = 0
        self._begin(stage, getattr(self, make))
        bar = self._bars.get(stage)
        if bar is not None:
            bar.reset(convert_inf(sum(getattr(trainer, batches))))

    def _on_evaluation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        self._evaluated += 1
        bar = self._show(str(trainer.state.stage), self._evaluated)
        if bar is not None:
            bar.refresh()

    def _on_evaluation_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        self._end(str(trainer.state.stage))

    on_validation_start = on_test_start = on_predict_start = _on_evaluation_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        _on_evaluation_batch_end
    )
    on_validation_end = on_test_end = on_predict_end = _on_evaluation_end

    def on_exception(self, *_: Any, **__: Any) -> None:
        for stage in list(self._bars):
            self._end(stage)

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bars."""
        for bar in self._bars.values():
            bar.write(sep.join(map(str, args)), **kwargs)
            return
        print(*args, sep=sep, **kwargs)
