"""Which values of a training are ordinary, by those that came before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

# Of normal noise: the median distance from the median times this is the standard deviation, and so many of these lie
# between the median and the 95th percentile.
_MAD_TO_DEVIATION = 1.4826
_P95_IN_DEVIATIONS = 1.645
# What is this many times as high as the highest value that was ordinary is not, whatever the noise.
_TIMES_THE_HIGHEST = 10.0
# Values from which on that is looked at.
_FEW = 5


class Baseline:
    """The last ordinary values, and the limit above which the next one is a spike.

    With the median m of the last values, and their deviation s, the limit is the higher one of m + threshold · s and
    the same of the values' logarithms. s is 1.4826 times the median distance from m, or (p - m) / 1.645 with the 95th
    percentile p if that is more, as for noise with a long tail. A loss near zero is why logarithms count: there one
    value may be a hundred times the next. Ten times the highest ordinary value is too high in any case.

    Args:
        window: how many values to keep.
        warmup: as long as there were fewer, ten times the highest value is the only limit.
        threshold: in standard deviations.
    """

    def __init__(self, window: int, warmup: int, threshold: float) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._warmup = warmup
        self._threshold = threshold
        self._count = 0
        self._highest = -math.inf

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._count = 0
        self._highest = -math.inf

    def add(self, values: Iterable[float]) -> None:
        """Add ordinary values."""
        for value in values:
            self._values.append(value)
            self._count += 1
            self._highest = max(self._highest, value)

    def limit(self) -> float:
        """The highest value that would be ordinary."""
        if self._count < _FEW:
            return math.inf
        most = math.inf
        if self._highest > 0:
            most = _TIMES_THE_HIGHEST * self._highest
        if self._count < self._warmup:
            return most
        limit = self._above(self._values)
        if min(self._values) > 0:
            log_limit = self._above([math.log(value) for value in self._values])
            limit = max(limit, math.exp(min(log_limit, 700.0)))
        return min(limit, most)

    def _above(self, values: Iterable[float]) -> float:
        values = sorted(values)
        half = len(values) // 2
        middle = values[half]
        distances = sorted([abs(value - middle) for value in values])
        high = values[int(0.95 * len(values))]
        deviation = max(
            _MAD_TO_DEVIATION * distances[half],
            (high - middle) / _P95_IN_DEVIATIONS,
        )
        return middle + self._threshold * deviation

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        highest = self._highest if self._count else None
        return {
            "values": list(self._values),
            "count": self._count,
            "highest": highest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self._values.clear()
        self._values.extend(state["values"])
        self._count = state["count"]
        highest = state["highest"]
        self._highest = -math.inf if highest is None else highest
