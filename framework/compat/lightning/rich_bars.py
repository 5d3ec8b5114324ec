"""Lightning's RichProgressBar: its tasks, which programs read, beside the bars that Loopwright's draws."""

from __future__ import annotations

from typing import Any

from ....callbacks import RichProgressBar as NativeRichProgressBar
from ....callbacks import RichProgressBarTheme
from ..imports import unserved

__all__ = [
    "CustomProgress",
    "MetricsTextColumn",
    "Progress",  # noqa: F822 # pyright: ignore[reportUnsupportedDunderAll] # __getattr__ finds it
    "RichProgressBar",
    "RichProgressBarTheme",
]

CustomProgress = unserved(
    "CustomProgress", "override RichProgressBar.configure_columns"
)
MetricsTextColumn = unserved(
    "MetricsTextColumn", "override RichProgressBar.configure_columns"
)


def __getattr__(name: str) -> Any:
    # rich is an extra.
    if name == "Progress":
        from rich.progress import Progress

        return Progress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RichProgressBar(NativeRichProgressBar):
    """A :class:`~loopwright.callbacks.RichProgressBar`, with the same arguments.

    Attributes:
        progress: holds a task for each bar, as Lightning has them. It draws nothing itself. None before the first run.
        train_progress_bar_id, val_sanity_progress_bar_id, val_progress_bar_id, test_progress_bar_id,
            predict_progress_bar_id: numbers of the tasks; None if there is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress: Any = None
        self._progress_stopped = False
        self._reset_progress_bar_ids()

    @property
    def is_disabled(self) -> bool:
        """Whether no bars are drawn."""
        return not self.is_enabled

    @property
    def train_progress_bar(self) -> Any:
        """The task of the training."""
        return self.progress.tasks[self.train_progress_bar_id]

    @property
    def val_sanity_check_bar(self) -> Any:
        """The task of the sanity check."""
        return self.progress.tasks[self.val_sanity_progress_bar_id]

    @property
    def val_progress_bar(self) -> Any:
        """The task of the validation."""
        return self.progress.tasks[self.val_progress_bar_id]

    @property
    def test_progress_bar(self) -> Any:
        """The task of the test."""
        return self.progress.tasks[self.test_progress_bar_id]

    def _reset_progress_bar_ids(self) -> None:
        self.train_progress_bar_id: Any = None
        self.val_sanity_progress_bar_id: Any = None
        self.val_progress_bar_id: Any = None
        self.test_progress_bar_id: Any = None
        self.predict_progress_bar_id: Any = None

    def _init_progress(self, trainer: Any) -> None:
        """Begin with no tasks, where there is no run whose tasks go on."""
        if self.is_disabled or (
            self.progress is not None and not self._progress_stopped
        ):
            return
        from rich.progress import Progress, TextColumn

        self._reset_progress_bar_ids()
        columns = (*self.configure_columns(trainer), TextColumn(""))
        self.progress = Progress(*columns, auto_refresh=False, disable=True)
        self.progress.start()
        self._progress_stopped = False

    def _stop_progress(self) -> None:
        if self.progress is not None and not self._progress_stopped:
            self.progress.stop()
            self._progress_stopped = True

    def _add_task(self, batches: Any, description: str, visible: bool = True) -> Any:
        style = self.theme.description
        text = f"[{style}]{description}" if style else description
        return self.progress.add_task(text, total=batches, visible=visible)

    def _update(self, number: Any, current: int, visible: bool = True) -> None:
        if self.is_enabled and self.progress is not None and number is not None:
            self.progress.update(number, completed=current, visible=visible)

    def _hide(self, number: Any) -> None:
        if self.is_enabled and self.progress is not None and number is not None:
            self.progress.update(number, advance=0, visible=False)

    # Training.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._init_progress(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.is_disabled:
            return
        if self.leave and self.train_progress_bar_id is not None:
            self._stop_progress()
        self._init_progress(trainer)
        batches = self.total_train_batches
        description = self._get_train_description(trainer.current_epoch)
        if self.train_progress_bar_id is None:
            self.train_progress_bar_id = self._add_task(batches, description)
            return
        self.progress.reset(
            self.train_progress_bar_id,
            total=batches,
            description=description,
            visible=True,
        )

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        last = "" if epochs in (None, -1) else f"/{epochs - 1}"
        text = f"{self.train_description} {current_epoch}{last}"
        # The bars of an epoch and of its validation stand below each other.
        return text.ljust(len(self.validation_description))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._update(self.train_progress_bar_id, batch_idx + 1)

    # Evaluations.

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._init_progress(trainer)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self._hide(self.val_sanity_progress_bar_id)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self.reset_dataloader_idx_tracker()
        self._init_progress(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_test_start(trainer, pl_module)
        self.reset_dataloader_idx_tracker()
        self._init_progress(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        self.reset_dataloader_idx_tracker()
        self._init_progress(trainer)

    def _must_begin(self, dataloader_idx: int) -> bool:
        """Whether a loader's first batch has come, whose task is to be made."""
        return self.has_dataloader_changed(dataloader_idx) and self.is_enabled

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._must_begin(dataloader_idx):
            return
        checks = trainer.sanity_checking
        name = "val_sanity_progress_bar_id" if checks else "val_progress_bar_id"
        text = self.sanity_check_description if checks else self.validation_description
        self._hide(getattr(self, name))
        batches = self.total_val_batches_current_dataloader
        setattr(self, name, self._add_task(batches, text, visible=False))

    def on_test_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._must_begin(dataloader_idx):
            self._hide(self.test_progress_bar_id)
            batches = self.total_test_batches_current_dataloader
            self.test_progress_bar_id = self._add_task(batches, self.test_description)

    def on_predict_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._must_begin(dataloader_idx):
            self._hide(self.predict_progress_bar_id)
            batches = self.total_predict_batches_current_dataloader
            self.predict_progress_bar_id = self._add_task(
                batches, self.predict_description
            )

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        number = {
            "sanity_check": self.val_sanity_progress_bar_id,
            "validate": self.val_progress_bar_id,
            "test": self.test_progress_bar_id,
            "predict": self.predict_progress_bar_id,
        }
        self._update(number[str(trainer.state.stage)], batch_idx + 1)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._hide(self.val_progress_bar_id)

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop_progress()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop_progress()

    def __getstate__(self) -> dict[str, Any]:
        # A terminal can be neither copied nor sent to another process.
        return {**super().__getstate__(), "progress": None}
