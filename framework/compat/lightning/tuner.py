"""Lightning's tuner."""

from __future__ import annotations

import inspect
from typing import Any

from ....callbacks.lr_finder import LearningRateResult
from ...optimization.tuner import Tuner as NativeTuner
from .callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    require_known_mode,
)
from .utilities import misconfigured_values

__all__ = ["Tuner", "_LRFinder"]

_LRFinder = LearningRateResult


class Tuner(NativeTuner):
    """A :class:`~loopwright.framework.Tuner`."""

    def lr_find(self, *args: Any, **kwargs: Any) -> LearningRateResult | None:
        """Arguments and result as of :meth:`loopwright.framework.Tuner.lr_find`."""
        given = _bound(NativeTuner.lr_find, self, *args, **kwargs)
        require_known_mode(LearningRateFinder.SUPPORTED_MODES, given["mode"])
        # Either may be the lower one.
        given["min_lr"], given["max_lr"] = sorted((given["min_lr"], given["max_lr"]))
        with misconfigured_values():
            result = super().lr_find(**given)
        self._keep_data(given)
        return result

    def scale_batch_size(self, *args: Any, **kwargs: Any) -> int | None:
        """Arguments and result as of :meth:`loopwright.framework.Tuner.scale_batch_size`."""
        given = _bound(NativeTuner.scale_batch_size, self, *args, **kwargs)
        require_known_mode(BatchSizeFinder.SUPPORTED_MODES, given["mode"])
        options = inspect.signature(BatchSizeFinder.__init__).parameters
        loaders = ("train_dataloaders", "val_dataloaders", "dataloaders")
        with misconfigured_values():
            finder = BatchSizeFinder(
                **{name: value for name, value in given.items() if name in options}
            )
            size = self._tune(
                finder.scale_batch_size,
                given["model"],
                tuple(given[name] for name in loaders),
                given["datamodule"],
                given["method"],
            )
        self._keep_data(given)
        return size

    def _keep_data(self, given: dict[str, Any]) -> None:
        """Let the Trainer tell the training loader that was found, until its first run."""
        if given["method"] == "fit":
            sources = (given["train_dataloaders"], given["datamodule"], given["model"])
            data = next(source for source in sources if source is not None)
            trainer: Any = self._trainer
            trainer.note_tuned_data(data)


def _bound(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments by name, but for self, with the defaults of those that are not given."""
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    del arguments.arguments["self"]
    return dict(arguments.arguments)
