"""What Lightning's Trainer refuses of callbacks, in the words that its programs look for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....callbacks import Callback, ModelCheckpoint, ProgressBar
from ...subclasses import overrides
from .utilities import MisconfiguredValue


def check_callbacks(arguments: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that exclude each other, or that an argument of the Trainer excludes.

    Args:
        arguments: the Trainer's.
        callbacks: the user's.

    Raises:
        MisconfigurationException: if one of them has to go.
        RuntimeError: if two keep their states under one name.
    """
    bars = [c for c in callbacks if isinstance(c, ProgressBar)]
    if len(bars) > 1:
        names = ", ".join(type(bar).__name__ for bar in bars)
        raise MisconfiguredValue(
            f"You added multiple progress bar callbacks to the Trainer, which takes one: {names}"
        )
    for argument, kind in (
        ("enable_checkpointing", ModelCheckpoint),
        ("enable_progress_bar", ProgressBar),
    ):
        found = [type(c).__name__ for c in callbacks if isinstance(c, kind)]
        if found and arguments.get(argument) is False:
            raise MisconfiguredValue(
                f"Trainer was configured with `{argument}=False` but found `{found[0]}` in the callbacks list."
            )
    _check_states(callbacks)


def _check_states(callbacks: Sequence[Any]) -> None:
    seen = set()
    for callback in callbacks:
        if not isinstance(callback, Callback):
            continue
        if not overrides(callback, "state_dict", Callback):
            continue
        key = callback.state_key
        if key in seen:
            raise RuntimeError(
                f"Found more than one stateful callback of type `{type(callback).__name__}`. In the current "
                f"configuration, both have the `state_key` {key!r}: give them different arguments, or override it"
            )
        seen.add(key)
