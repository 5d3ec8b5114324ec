"""Loggers: where the numbers of a run go. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from .csv import CSVLogger
    from .json_lines import JSONLinesLogger
    from .tensorboard import TensorBoardLogger

_MODULES = {
    "CSVLogger": "csv",
    "JSONLinesLogger": "json_lines",
    "TensorBoardLogger": "tensorboard",
}

BY_NAME = {
    "csv": "CSVLogger",
    "jsonl": "JSONLinesLogger",
    "tensorboard": "TensorBoardLogger",
}
"""The loggers by the names that ``Trainer(logger=...)`` takes."""

__all__ = ["CSVLogger", "JSONLinesLogger", "Logger", "TensorBoardLogger"]


def named_logger(name: str, save_dir: str) -> Logger:
    """The logger of a name in :data:`BY_NAME`.

    Args:
        name: in small or capital letters.
        save_dir: the folder under which it keeps its files.

    Raises:
        ValueError: for another name.
    """
    kind = BY_NAME.get(name.lower())
    if kind is None:
        raise ValueError(
            f"logger must be one of {', '.join(BY_NAME)}, or a Logger; got {name!r}"
        )
    return getattr(import_module(f".{_MODULES[kind]}", __name__), kind)(
        save_dir=save_dir
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
