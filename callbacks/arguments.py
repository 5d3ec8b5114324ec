"""Checks of callbacks' arguments: each error names the argument, what is accepted and what came."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def require(valid: bool, name: str, accepted: str, value: Any) -> None:
    """Refuse the value of the argument ``name`` unless it is valid.

    Raises:
        ValueError: if it is not.
    """
    if not valid:
        raise ValueError(f"{name} must be {accepted}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and neither True nor False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_int(name: str, value: Any, least: int, accepted: str = "") -> None:
    """Refuse a value that is not an integer of at least ``least``."""
    # NumPy's integers are Integral, too; and so are True and False, which are not meant.
    valid = (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and int(value) >= least
    )
    require(valid, name, accepted or f"an int of at least {least}", value)


def require_choice(name: str, value: Any, *choices: Any) -> None:
    """Refuse a value that is not among ``choices``."""
    require(
        value in choices,
        name,
        " or ".join(map(repr, choices)),
        value,
    )
