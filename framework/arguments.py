"""Checks of the Trainer's arguments: each error names the argument, what is accepted and what came."""

from __future__ import annotations

from datetime import timedelta
from typing import Any


def check_count(name: str, value: Any, minimum: int, extra: tuple[Any, ...] = ()) -> None:
    """Require an integer from ``minimum``, or one of ``extra``."""
    if any(value is item or (type(value) is type(item) and value == item) for item in extra):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        others = "".join(f", or {item!r}" for item in extra)
        raise ValueError(f"{name} must be an integer from {minimum}{others}; got {value!r}")


def check_limit(name: str, value: Any) -> int | float:
    """Require a number of batches (int) or a fraction (float from 0.0 to 1.0); None means all."""
    if value is None:
        return 1.0
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    fraction = isinstance(value, float) and 0.0 <= value <= 1.0
    if not whole and not fraction:
        raise ValueError(f"{name} must be a number of batches (int from 0) or a fraction (0.0 to 1.0); got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Require one of ``choices``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_clipping(value: Any, algorithm: Any) -> str:
    """Check the two clipping arguments; returns the algorithm."""
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0):
        raise ValueError(f"gradient_clip_val must be a number from 0, or None; got {value!r}")
    check_choice("gradient_clip_algorithm", algorithm, (None, "norm", "value"))
    return algorithm or "norm"


def check_interval(value: Any, check_val_every_n_epoch: Any) -> int | float:
    """Check ``val_check_interval``: a number of batches, or a fraction of an epoch."""
    if value is None:
        return 1.0
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        if check_val_every_n_epoch is None and value != 1.0:
            raise ValueError(
                f"val_check_interval must be a number of batches (int) with check_val_every_n_epoch=None; got {value!r}"
            )
        return value
    raise ValueError(
        "val_check_interval must be a number of batches (int from 1) or a fraction of an epoch (up to 1.0); "
        f"got {value!r}"
    )


def check_max_time(value: Any) -> None:
    """Require a duration that the Timer takes."""
    if value is not None and not isinstance(value, (str, dict, timedelta)):
        raise TypeError(f'max_time must be "DD:HH:MM:SS", a timedelta or a dict of its arguments; got {value!r}')
