"""The Trainer and what it runs."""

from .checkpoint import CheckpointError
from .datamodule import DataModule
from .engine import Engine
from .loaders import CombinedLoader
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
    "isolated_rng",
    "seed_everything",
]
