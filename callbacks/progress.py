"""What all progress bars have: subclass it for one of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class ProgressBar(Callback):
    """The base of progress bars. It draws nothing: override the hooks at which your bar is drawn.

    A Trainer that is given a subclass of it makes no bar of its own. It runs among the callbacks that decide, when
    an epoch's values are complete.

    Attributes:
        sanity_check_description, train_description, validation_description, test_description,
            predict_description: what the bars are called.
    """

    phase = "decide"

    sanity_check_description = "Sanity check"
    train_description = "Epoch"
    validation_description = "Validation"
    test_description = "Test"
    predict_description = "Prediction"

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._enabled = True
        # The index of the loader that an evaluation reads; None before its first batch.
        self._loader_idx: int | None = None

    @property
    def trainer(self) -> Trainer:
        """The Trainer whose progress is shown.

        Raises:
            RuntimeError: before a run has begun.
        """
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self).__name__}.trainer is there from setup on, not before"
            )
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether to draw: in the main process, unless it was switched off."""
        return self._enabled and (self._trainer is None or self._trainer.is_global_zero)

    @property
    def total_train_batches(self) -> int | float:
        """Batches of a training epoch."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches_current_epoch(self) -> int | float:
        """Batches of all loaders of a validation, or of the sanity check while that runs."""
        return sum(self._val_batches)

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """The same, of the loader that :meth:`has_dataloader_changed` was told last."""
        return self._val_batches[self._loader_idx or 0]

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the loader that :meth:`has_dataloader_changed` was told last."""
        return self.trainer.num_test_batches[self._loader_idx or 0]

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the loader that :meth:`has_dataloader_changed` was told last."""
        return self.trainer.num_predict_batches[self._loader_idx or 0]

    @property
    def _val_batches(self) -> list[Any]:
        if self.trainer.sanity_checking:
            return self.trainer.num_sanity_val_batches
        return self.trainer.num_val_batches

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this loader is another one than in the call before.

        Args:
            dataloader_idx: its index, as a batch's hooks are given it.
        """
        changed = dataloader_idx != self._loader_idx
        self._loader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Take the next loader for a new one, whatever its index."""
        self._loader_idx = None

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def disable(self) -> None:
        """Draw nothing until :meth:`enable` is called."""
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._trainer = trainer

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the bar."""
        print(*args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, Any]:
        """What to show beside the bar: the logger's version as ``v_num``, and what was logged with ``prog_bar=True``.

        It is called when the bar is about to be drawn. Reading the values may wait for the device.

        Args:
            trainer: whose progress is shown.
            pl_module: that it runs.

        Returns:
            Numbers and texts by name.
        """
        metrics = dict(trainer.progress_bar_metrics)
        version = trainer.loggers[0].version if trainer.loggers else None
        if version in (None, ""):
            return metrics
        if isinstance(version, str):
            version = version[-4:]
        return {"v_num": version, **metrics}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}
