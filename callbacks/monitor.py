"""A logged value that a callback watches: when it is there, and what to say when it is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..framework import Trainer
    from .base import Callback


def not_logged(callback: Callback, monitor: str, logged: Iterable[str]) -> RuntimeError:
    """The error for a ``monitor`` that nobody logged, with the names that were."""
    names = sorted(logged)
    close = get_close_matches(monitor, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return RuntimeError(
        f"{type(callback).__name__}(monitor={monitor!r}): nothing of that name was logged; "
        f"logged so far: {', '.join(map(repr, names)) or 'nothing'}.{hint} "
        f"Log it with self.log({monitor!r}, ...) in the module."
    )


def acts_at_epoch_ends(trainer: Trainer, asked: bool | None) -> bool:
    """Whether to act when an epoch ends, rather than when a validation does: as asked for.

    If that is left open, it is so where each epoch's end is the one moment with fresh values: also without validation.
    """
    if asked is not None:
        return asked
    if not trainer.enable_validation:
        return True
    interval = trainer.val_check_interval
    # As an int, 1 means after every batch; only as a float it is the whole epoch.
    return (
        trainer.check_val_every_n_epoch == 1
        and isinstance(interval, float)
        and interval == 1.0
    )
