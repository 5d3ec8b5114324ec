"""Loggers: where the numbers of a run go. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from .csv import CSVLogger
    from .tensorboard import TensorBoardLogger

_MODULES = {
    "CSVLogger": "csv",
    "TensorBoardLogger": "tensorboard",
}

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
