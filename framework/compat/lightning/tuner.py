"""Lightning's tuner."""

from __future__ import annotations

from typing import Any

from ....callbacks.lr_finder import LearningRateResult
from ...optimization.tuner import Tuner as NativeTuner
from .callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    require_known_mode,
    warn_of_two_fields,
)
from .utilities import misconfigured_values

__all__ = ["Tuner", "_LRFinder"]

_LRFinder = LearningRateResult


class Tuner(NativeTuner):
    """A :class:`~loopwright.framework.Tuner`."""

    def lr_find(self, *args: Any, **kwargs: Any) -> LearningRateResult | None:
        """Arguments and result as of :meth:`loopwright.framework.Tuner.lr_find`."""
        modes = LearningRateFinder.SUPPORTED_MODES
        require_known_mode(modes, kwargs.get("mode", "exponential"))
        with misconfigured_values():
            return super().lr_find(*args, **kwargs)

    def scale_batch_size(self, model: Any, *args: Any, **kwargs: Any) -> int | None:
        """Arguments and result as of :meth:`loopwright.framework.Tuner.scale_batch_size`."""
        modes = BatchSizeFinder.SUPPORTED_MODES
        require_known_mode(modes, kwargs.get("mode", "power"))
        warn_of_two_fields(model, kwargs.get("batch_arg_name", "batch_size"))
        with misconfigured_values():
            return super().scale_batch_size(model, *args, **kwargs)
