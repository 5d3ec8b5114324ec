"""A metric's curve, and how a long one is thinned without losing its extremes."""

from __future__ import annotations

import math
from array import array
from itertools import pairwise
from typing import Any

# The sum of all curves' points in a page. A point is about 30 bytes of the file.
MAX_POINTS = 240_000
# A curve is thinned to no fewer and no more points than these.
FEWEST_POINTS = 200
MOST_POINTS = 6_000


class Series:
    """Values of one metric, in the order in which they were logged.

    Attributes:
        steps: of each value: optimizer steps.
        times: in seconds since 1970; NaN where it is unknown.
        values: any number, NaN and infinities too.
    """

    def __init__(self) -> None:
        self.steps = array("d")
        self.times = array("d")
        self.values = array("d")

    def __len__(self) -> int:
        return len(self.values)

    def add(self, step: float, value: float, time: float = math.nan) -> None:
        """Add one value."""
        self.steps.append(step)
        self.values.append(value)
        self.times.append(time)

    def drop_from(self, step: float) -> None:
        """Drop the values from a step on, as a run that is resumed logs them again."""
        kept = [index for index, at in enumerate(self.steps) if at < step]
        for name in ("steps", "times", "values"):
            column = getattr(self, name)
            setattr(self, name, array("d", (column[index] for index in kept)))


def as_number(value: Any) -> float | None:
    """Return a logged value as a number, NaN and infinities too; None if it is none."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def points_for_each(num_series: int) -> int:
    """Return how many points each of so many curves may have in one page."""
    share = MAX_POINTS // max(num_series, 1)
    return min(max(share, FEWEST_POINTS), MOST_POINTS)


def curve(series: Series, start: float, max_points: int) -> dict[str, Any]:
    """Return a curve as the page draws it.

    Args:
        series: what was logged.
        start: of the run, in seconds since 1970, from which times count.
        max_points: of a longer curve, the first, last, smallest, largest and first and last odd (NaN, infinite) value
            of equal parts are kept, with the mean of each part, from which the smoothed line is drawn.

    Returns:
        Columns ``x``, ``y`` (None where a value is odd) and ``t``; ``odd``, pairs of an index and what stands there;
        ``mean``, the columns of the parts' means, or None if all values are kept; the ``count`` of values, and the
        ``last``, ``min`` and ``max`` with their steps.
    """
    import numpy

    steps = numpy.frombuffer(series.steps)
    values = numpy.frombuffer(series.values)
    times = numpy.frombuffer(series.times) - start
    if numpy.any(numpy.diff(steps) < 0):
        # Files of several writers, one after the other.
        order = numpy.argsort(steps, kind="stable")
        steps = steps[order]
        values = values[order]
        times = times[order]
    finite = numpy.isfinite(values)
    kept = numpy.arange(len(values))
    mean = None
    if len(values) > max_points:
        parts = _parts(len(values), max_points)
        kept = _kept(values, finite, parts)
        mean = _means(steps, values, times, finite, parts)
    shown = _columns(steps[kept], values[kept], times[kept])
    odd = []
    for index, at in enumerate(kept.tolist()):
        if not finite[at]:
            odd.append([index, str(values[at])])
    extremes = _extremes(steps, values, finite)
    return {**shown, "odd": odd, "mean": mean, "count": len(values), **extremes}


def _parts(length: int, max_points: int) -> list[tuple[int, int]]:
    """Divide so many values into parts of which at most four values each are kept."""
    count = max(max_points // 4, 1)
    ends = [length * part // count for part in range(count + 1)]
    return list(pairwise(ends))


def _kept(values: Any, finite: Any, parts: list[tuple[int, int]]) -> Any:
    """Return the indices of what stays of each part."""
    import numpy

    low = numpy.where(finite, values, numpy.inf)
    high = numpy.where(finite, values, -numpy.inf)
    every_value_is_finite = bool(finite.all())
    kept = set()
    for begin, end in parts:
        smallest = low[begin:end].argmin()
        largest = high[begin:end].argmax()
        kept |= {begin, end - 1}
        kept |= {begin + int(smallest), begin + int(largest)}
        if every_value_is_finite:
            continue
        odd = numpy.flatnonzero(~finite[begin:end])
        if len(odd):
            kept |= {begin + int(odd[0]), begin + int(odd[-1])}
    return numpy.array(sorted(kept))


def _means(
    steps: Any, values: Any, times: Any, finite: Any, parts: list[tuple[int, int]]
) -> dict[str, Any]:
    """Return the columns of the parts' means, of the finite values."""
    import numpy

    begins = numpy.array([begin for begin, _ in parts])
    counts = numpy.add.reduceat(finite.astype(float), begins)
    lengths = numpy.array([end - begin for begin, end in parts])
    sums = numpy.add.reduceat(numpy.where(finite, values, 0.0), begins)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    x = numpy.add.reduceat(steps, begins) / lengths
    t = numpy.add.reduceat(times, begins) / lengths
    return _columns(x, means, t)


def _columns(steps: Any, values: Any, times: Any) -> dict[str, Any]:
    t: list[Any] | None = None
    if len(times) and math.isfinite(float(times[0])):
        t = [_rounded(time) for time in times.tolist()]
    return {
        "x": [_plain(step) for step in steps.tolist()],
        "y": [_plain(value) for value in values.tolist()],
        "t": t,
    }


def _rounded(time: float) -> float | None:
    if math.isfinite(time):
        return round(time, 2)
    return None


def _extremes(steps: Any, values: Any, finite: Any) -> dict[str, Any]:
    """Return the last, the smallest and the largest value, each with its step."""
    last_value: Any = values[-1].item()
    last_step = steps[-1].item()
    if math.isfinite(last_value):
        last_value = _plain(last_value)
    else:
        last_value = str(values[-1])
    found: dict[str, Any] = {
        "last": [last_value, _plain(last_step)],
        "min": None,
        "max": None,
    }
    if finite.any():
        only = values[finite]
        at = steps[finite]
        extremes = {"min": only.argmin(), "max": only.argmax()}
        for name, index in extremes.items():
            value = only[index].item()
            step = at[index].item()
            found[name] = [_plain(value), _plain(step)]
    return found


def _plain(value: float) -> float | int | None:
    """Return a number as short as JSON may have it: nine digits; None if it is not finite."""
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.9g}")
