"""The Trainer, the Engine, and what they run."""

from .checkpoint import CheckpointError
from .datamodule import DataModule
from .engine import Engine
from .loaders import CombinedLoader
from .memory import find_executable_batch_size
from .module import Module
from .processes import launch
from .rank_logger import get_logger
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
