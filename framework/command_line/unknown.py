"""What is said of a command or an option that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """Say that there is none of that name, and which one may be meant.

    Args:
        what: of which kind.
        name: as it was written.
        known: those that there are.
    """
    close = get_close_matches(name, list(known), n=1)
    advice = f"did you mean {close[0]!r}?" if close else "--help lists them"
    return f"there is no {what} {name!r}; {advice}"
