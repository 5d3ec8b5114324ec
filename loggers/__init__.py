"""Loggers: where the numbers of a run go. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from .comet import CometLogger
    from .csv import CSVLogger
    from .json_lines import JSONLinesLogger
    from .mlflow import MLFlowLogger
    from .tensorboard import TensorBoardLogger
    from .trackio import TrackioLogger
    from .wandb import WandbLogger

_MODULES = {
    "CSVLogger": "csv",
    "CometLogger": "comet",
    "JSONLinesLogger": "json_lines",
    "MLFlowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "TrackioLogger": "trackio",
    "WandbLogger": "wandb",
}

BY_NAME = {
    "comet": "CometLogger",
    "csv": "CSVLogger",
    "jsonl": "JSONLinesLogger",
    "mlflow": "MLFlowLogger",
    "tensorboard": "TensorBoardLogger",
    "trackio": "TrackioLogger",
    "wandb": "WandbLogger",
}
"""The loggers by the names that ``Trainer(logger=...)`` takes."""

__all__ = [
    "CSVLogger",
    "CometLogger",
    "JSONLinesLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
]


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
