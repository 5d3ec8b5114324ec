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
