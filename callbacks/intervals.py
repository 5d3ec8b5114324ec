"""Intervals of a training as text: ``"500 steps"``, ``"2 epochs"``, ``"10 minutes"``, ``"1M tokens"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .arguments import require

# In seconds.
_TIMES = {
    "second": 1.0,
    "sec": 1.0,
    "s": 1.0,
    "minute": 60.0,
    "min": 60.0,
    "hour": 3600.0,
    "h": 3600.0,
    "day": 86400.0,
}
_COUNTED = ("step", "epoch", "token", "batch")
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Interval:
    """How much of a training comes between two times.

    Attributes:
        amount: so many of the unit.
        unit: ``"steps"`` (of the optimizer), ``"epochs"``, ``"seconds"``, ``"batches"`` or ``"tokens"``: the weights
            that ``training_step`` returns, of all processes.
    """

    amount: float
    unit: str

    def count(self, unit: str) -> int | None:
        """The amount, if this is its unit."""
        return int(self.amount) if self.unit == unit else None

    def __str__(self) -> str:
        return f"{self.amount:.16g} {self.unit}"


def read_interval(name: str, value: Any, *units: str) -> Interval:
    """Read an interval.

    Args:
        name: of the argument, for errors.
        value: a text, such as ``"500 steps"`` or ``"1.5M tokens"``; or a time, as :func:`seconds_of` takes it.
        *units: those that are accepted, as of :class:`Interval`.

    Raises:
        ValueError: if it is none, has another unit, or is not above 0.
    """
    examples = {
        "steps": '"500 steps"',
        "epochs": '"2 epochs"',
        "seconds": '"10 minutes"',
        "tokens": '"1M tokens"',
        "batches": '"100 batches"',
    }
    accepted = " or ".join(examples[unit] for unit in units)
    interval = _of_text(value) if isinstance(value, str) else None
    if interval is None and "seconds" in units:
        seconds = _of_time(value)
        interval = None if seconds is None else Interval(seconds, "seconds")
    valid = interval is not None and interval.unit in units and interval.amount > 0
    require(valid, name, f"an interval such as {accepted}", value)
    assert interval is not None
    # A validation may also come after a fraction of an epoch.
    is_fraction = interval.unit == "epochs" and "batches" in units
    if interval.unit != "seconds" and not (is_fraction and interval.amount < 1.0):
        is_whole = interval.amount == int(interval.amount)
        require(is_whole, name, f"a whole number of {interval.unit}", value)
    return interval


def steps_of(name: str, every: str | None, default: int) -> int:
    """Read an interval of optimizer steps; returns how many, which is ``default`` where there is none.

    Args:
        name: of the argument, for errors.
        every: a text, such as ``"500 steps"``, or None.
        default: what another argument says.

    Raises:
        ValueError: if it is none, or of another unit.
    """
    if every is None:
        return default
    return int(read_interval(name, every, "steps").amount)


def seconds_of(name: str, value: Any) -> float:
    """Read a duration; returns seconds.

    Args:
        name: of the argument, for errors.
        value: ``"DD:HH:MM:SS"``, ``"HH:MM:SS"``, a text such as ``"10 minutes"``, a ``timedelta`` or a dict of its
            arguments.

    Raises:
        ValueError: if it is none of these.
    """
    seconds = _of_time(value)
    if seconds is None and isinstance(value, str):
        interval = _of_text(value)
        if interval is not None and interval.unit == "seconds":
            seconds = interval.amount
    accepted = "'DD:HH:MM:SS', '10 minutes', a timedelta or a dict of its arguments"
    require(seconds is not None, name, accepted, value)
    assert seconds is not None
    return seconds


def _of_text(value: str) -> Interval | None:
    match = re.fullmatch(
        r"([\d_]*\.?\d+)\s*([kmgbt]?)\s+([a-z]+)", value.strip().lower()
    )
    if match is None:
        return None
    number, multiple, unit = match.groups()
    amount = round(float(number) * _MULTIPLES[multiple], 9)
    if unit == "batches":
        return Interval(amount, unit)
    for singular in (unit, unit.removesuffix("s")):
        if singular in _TIMES:
            return Interval(amount * _TIMES[singular], "seconds")
        if singular in _COUNTED:
            plural = "batches" if singular == "batch" else f"{singular}s"
            return Interval(amount, plural)
    return None


def _of_time(value: Any) -> float | None:
    """The seconds of a duration that is not written in words; None if it is none."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        try:
            return timedelta(**value).total_seconds()
        except TypeError:
            return None
    match = None
    if isinstance(value, str):
        match = re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d):(\d\d)", value.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
