"""The Trainer, the Engine, and what they run."""

from .data.combined import CombinedLoader
from .datamodule import DataModule
from .engine.batch_size import find_executable_batch_size
from .engine.engine import Engine
from .engine.rank_logger import get_logger
from .errors import CheckpointError
from .lifecycle.processes import launch
from .module import Module
from .seed import isolated_rng, seed_everything
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CombinedLoader",
    "DataModule",
    "Engine",
    "Module",
    "Trainer",
    "find_executable_batch_size",
    "get_logger",
    "isolated_rng",
    "launch",
    "seed_everything",
]


def __dir__() -> list[str]:
    return __all__
