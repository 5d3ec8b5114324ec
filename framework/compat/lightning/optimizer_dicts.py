"""What ``configure_optimizers`` returns under Lightning's names: what it warns of there, and Loopwright refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR

from ...loop.optimizers import LRSchedulerConfig
from ...module import Module
from ...subclasses import overrides
from .words import warn

_OF_OPTIMIZER = ("optimizer", "lr_scheduler", "monitor")
_OF_SCHEDULER = tuple(LRSchedulerConfig.__dataclass_fields__)
_HOOK = "configure_optimizers"


@contextmanager
def known_keys_only(module: Any) -> Iterator[None]:
    """Leave what nobody knows out of what the module's hook returns, with a warning, inside a ``with`` block.

    Args:
        module: whose ``configure_optimizers`` may be called in it.
    """
    if not isinstance(module, Module) or not overrides(module, _HOOK, Module):
        yield
        return
    attributes = module.__dict__
    own = attributes.get(_HOOK)
    ours = partial(_known_part, module.configure_optimizers)
    attributes[_HOOK] = ours
    try:
        yield
    finally:
        # A program may have set another one meanwhile.
        if attributes.get(_HOOK) is ours:
            del attributes[_HOOK]
            if own is not None:
                attributes[_HOOK] = own


def _known_part(hook: Any) -> Any:
    return _known(hook())


def _known(returned: Any) -> Any:
    """What was returned, in its form, with the keys that are known."""
    if isinstance(returned, dict):
        kept = _without_others(returned, _OF_OPTIMIZER, "optimizer configuration")
        if kept.get("lr_scheduler") is not None:
            kept["lr_scheduler"] = _scheduler(kept["lr_scheduler"])
        return kept
    if not isinstance(returned, (list, tuple)):
        return returned
    if returned and all(isinstance(item, dict) for item in returned):
        return [_known(item) for item in returned]
    if len(returned) == 2 and isinstance(returned[1], (list, tuple)):
        optimizers, schedulers = returned
        return optimizers, [_scheduler(item) for item in schedulers]
    return returned


def _scheduler(scheduler: Any) -> Any:
    """A scheduler, or its dict with the keys that are known."""
    if not isinstance(scheduler, dict):
        return scheduler
    if "scheduler" not in scheduler:
        return scheduler
    kept = _without_others(scheduler, _OF_SCHEDULER, "lr scheduler dict")
    by_epoch = kept.get("interval", "epoch") == "epoch"
    if by_epoch and isinstance(kept["scheduler"], OneCycleLR):
        warn(
            "A `OneCycleLR` scheduler is using 'interval': 'epoch'. Are you sure you didn't mean 'interval': 'step'?",
            RuntimeWarning,
        )
    return kept


def _without_others(given: Any, known: Any, what: str) -> dict[str, Any]:
    others = {key for key in given if key not in known}
    if others:
        warn(f"Found unsupported keys in the {what}: {others}", RuntimeWarning)
    return {key: value for key, value in given.items() if key in known}
