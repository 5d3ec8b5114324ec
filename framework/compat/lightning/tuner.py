"""Lightning's tuner."""

from __future__ import annotations

from ....callbacks.lr_finder import LearningRateResult
from ...optimization.tuner import Tuner as NativeTuner
from .callbacks import BatchSizeFinder, LearningRateFinder
from .utilities import MisconfiguredValue

__all__ = ["Tuner", "_LRFinder"]

_LRFinder = LearningRateResult


class Tuner(NativeTuner):
    """A :class:`~loopwright.framework.Tuner`."""

    error = MisconfiguredValue
    learning_rate_finder = LearningRateFinder
    batch_size_finder = BatchSizeFinder
