"""Lightning's progress bars: what programs override, patch and read of them, on Loopwright's."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from ....callbacks import ProgressBar, RichProgressBarTheme
from ....callbacks import TQDMProgressBar as NativeTQDMProgressBar
from ....callbacks.tqdm_progress import convert_inf
from .rich_bars import RichProgressBar

__all__ = [
    "ProgressBar",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "Tqdm",  # noqa: F822 # pyright: ignore[reportUnsupportedDunderAll] # __getattr__ makes it
    "convert_inf",
    "get_standard_metrics",
]

# Drawn more often, the page of a Colab notebook hangs.
_COLAB_REFRESH_RATE = 20


@functools.cache
def _tqdm_class() -> type:
    """The class of the bars; not made before somebody asks for it, as tqdm is an extra."""
    from tqdm.auto import tqdm

    class Tqdm(tqdm):
        """A bar of tqdm that shows numbers with as many digits from one drawing to the next."""

        @staticmethod
        def format_num(n: Any) -> str:
            if isinstance(n, str) and "." not in n:
                return n
            try:
                number = float(n)
            except ValueError:
                return n
            text = tqdm.format_num(n if isinstance(n, int) else number)
            if isinstance(n, int) or "e" in text:
                return text
            return f"{number:.3f}" if len(text.partition(".")[2]) < 3 else text

    return Tqdm


def __getattr__(name: str) -> Any:
    if name == "Tqdm":
        return _tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _bar_class() -> Any:
    # As a program may have set another one in this module.
    return sys.modules[__name__].Tqdm


def get_standard_metrics(trainer: Any) -> dict[str, Any]:
    """What a bar shows beside the values that were logged: the logger's version, as ``v_num``.

    Args:
        trainer: whose progress is shown.
    """
    shown = ProgressBar().get_metrics(trainer, None)  # type: ignore[arg-type] # it asks the module for nothing
    logged = trainer.progress_bar_metrics
    return {name: value for name, value in shown.items() if name not in logged}


class TQDMProgressBar(NativeTQDMProgressBar):
    """A :class:`~loopwright.callbacks.TQDMProgressBar`: one bar for each loader, and bars that stay when a run ends.

    Args:
        refresh_rate: after how many batches to draw, though not more often than ten times a second; 0 shows nothing.
            ``TQDM_MINITERS`` in the environment is the least.
        process_position: how many lines below the first bars are drawn; ``TQDM_POSITION`` is the least.
        leave: leave each epoch's bar on the screen.
    """

    sanity_check_description = "Sanity Checking"
    test_description = "Testing"
    predict_description = "Predicting"

    def __init__(
        self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False
    ) -> None:
        if os.environ.get("COLAB_GPU") and refresh_rate == 1:
            refresh_rate = _COLAB_REFRESH_RATE
        refresh_rate = max(refresh_rate, int(os.environ.get("TQDM_MINITERS", 0)))
        position = max(process_position, int(os.environ.get("TQDM_POSITION", 0)))
        super().__init__(refresh_rate, position, leave)

    def _bar(self, stage: str) -> Any:
        # A sanity check has the bar of a validation.
        stage = {"validate": "val", "sanity_check": "val"}.get(stage, stage)
        if stage not in self._bars:
            raise TypeError(
                f"The `{type(self).__name__}._{stage}_progress_bar` reference has not been set yet."
            )
        return self._bars[stage]

    def _made(self, description: str, lines: int = 0, **options: Any) -> Any:
        return _bar_class()(
            desc=description,
            position=2 * self.process_position + lines,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
            **options,
        )

    def _end(self, stage: str) -> None:
        # It can be asked for afterwards.
        if stage in self._bars:
            self._bars[stage].close()

    def _begin_loader(self, bar: Any, batches: Any, description: str) -> None:
        bar.reset(convert_inf(batches))
        bar.initial = 0
        bar.set_description(description)

    # Training.

    def on_train_start(self, *_: Any, **__: Any) -> None:
        self._bars["train"] = self.init_train_tqdm()

    def on_train_epoch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        if self._leave:
            self._bars["train"] = self.init_train_tqdm()
        bar = self.train_progress_bar
        epoch = f"{self.train_description} {trainer.current_epoch}"
        self._begin_loader(bar, self.total_train_batches, epoch)
        bar.initial = trainer.batch_idx

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._leave:
            self._end("train")

    # Evaluations.

    def on_sanity_check_start(self, *_: Any, **__: Any) -> None:
        # There is an epoch's bar to ask for, which is not drawn.
        self._bars["train"] = _bar_class()(disable=True)
        self._bars["val"] = self.init_sanity_tqdm()

    def on_sanity_check_end(self, *_: Any, **__: Any) -> None:
        self._end("val")

    def on_validation_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.reset_dataloader_idx_tracker()
        if not trainer.sanity_checking:
            self._bars["val"] = self.init_validation_tqdm()

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            checks = trainer.sanity_checking
            kind = (
                self.sanity_check_description if checks else self.validation_description
            )
            self._begin_loader(
                self.val_progress_bar,
                self.total_val_batches_current_dataloader,
                f"{kind} DataLoader {dataloader_idx}",
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        bar = self._bars.get("train")
        if bar is not None and trainer.state.fn == "fit":
            bar.set_postfix(self.get_metrics(trainer, pl_module))
        self._end("val")

    def on_test_start(self, *_: Any, **__: Any) -> None:
        self.reset_dataloader_idx_tracker()
        self._bars["test"] = self.init_test_tqdm()

    def on_test_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin_loader(
                self.test_progress_bar,
                self.total_test_batches_current_dataloader,
                f"{self.test_description} DataLoader {dataloader_idx}",
            )

    def on_test_end(self, *_: Any, **__: Any) -> None:
        self._end("test")

    def on_predict_start(self, *_: Any, **__: Any) -> None:
        self.reset_dataloader_idx_tracker()
        self._bars["predict"] = self.init_predict_tqdm()

    def on_predict_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin_loader(
                self.predict_progress_bar,
                self.total_predict_batches_current_dataloader,
                f"{self.predict_description} DataLoader {dataloader_idx}",
            )

    def on_predict_end(self, *_: Any, **__: Any) -> None:
        self._end("predict")

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._draw("val", batch_idx)

    def on_test_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._draw("test", batch_idx)

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._draw("predict", batch_idx)

    def _draw(self, stage: str, batch_idx: int) -> None:
        bar = self._show(stage, batch_idx + 1)
        if bar is not None:
            bar.refresh()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bars."""
        if any(not bar.disable for bar in self._bars.values()):
            _bar_class().write(sep.join(map(str, args)), **kwargs)
        else:
            print(*args, sep=sep, **kwargs)
