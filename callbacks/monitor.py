"""A logged value that a callback watches: when it is there, and what to say when it is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..framework import Trainer
    from .base import Callback


def worst_value(mode: str) -> Tensor:
    """The value than which all others are better: infinity for ``"min"``, minus infinity for ``"max"``."""
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)


def not_logged(callback: Callback, monitor: str, logged: Iterable[str]) -> RuntimeError:
    """The error for a monitor that nobody logged.

    Args:
        callback: that watches it.
        monitor: the name that was not logged.
        logged: the names that were.
    """
    names = sorted(logged)
    close = get_close_matches(monitor, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return RuntimeError(
        f"{type(callback).__name__}(monitor={monitor!r}): nothing of that name was logged; "
        f"logged so far: {', '.join(map(repr, names)) or 'nothing'}.{hint} "
        f"Log it with self.log({monitor!r}, ...) in the module."
    )


def acts_at_epoch_ends(trainer: Trainer, requested: bool | None) -> bool:
    """Whether a callback acts when an epoch ends, rather than when a validation does.

    Args:
        trainer: whose validations count.
        requested: what the user chose. None leaves it open: then it is at the end of epochs if that is the one moment
            with fresh values, as where validation runs once in every epoch, or never.
    """
    if requested is not None:
        return requested
    if not trainer.enable_validation:
        return True
    if trainer.check_val_every_n_epoch != 1:
        return False
    # As an int, 1 means after every batch; only as a float it is the whole epoch.
    interval = trainer.val_check_interval
    return isinstance(interval, float) and interval == 1.0
