"""Strategies: on which devices, in how many processes and in which precision a module runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Strategy
from .precision import Precision

if TYPE_CHECKING:
    from .single_device import SingleDeviceStrategy

_MODULES = {"SingleDeviceStrategy": "single_device"}

# What `Trainer(strategy=...)` takes, and the class behind each name.
STRATEGIES = {"auto": "SingleDeviceStrategy", "single": "SingleDeviceStrategy"}

# Families of names that people will ask for; this version says so rather than calling them unknown.
_LATER = ("ddp", "fsdp", "deepspeed")

__all__ = ["STRATEGIES", "Precision", "SingleDeviceStrategy", "Strategy", "create_strategy"]


def create_strategy(strategy: str | Strategy) -> Strategy:
    """Return the strategy of that name, or the object itself.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a name or a Strategy, got {strategy!r}")
    if strategy == "dp":
        raise ValueError(
            'strategy="dp" (torch.nn.DataParallel) is not supported: it is slow, and torch advises against it; '
            'strategy="ddp" is what takes its place'
        )
    if strategy.startswith(_LATER):
        raise ValueError(
            f"strategy={strategy!r} is not part of this version yet, which runs in one process on one device; "
            'use strategy="single"'
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be a Strategy or one of {', '.join(STRATEGIES)}; got {strategy!r}")
    return __getattr__(STRATEGIES[strategy])()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
