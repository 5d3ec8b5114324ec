"""The Trainer, the Engine, and what they run.

Each name is imported when it is first used, so that a command such as ``loopwright --help`` does not wait for torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli import LoopwrightCLI as LoopwrightCLI
    from .data.combined import CombinedLoader
    from .datamodule import DataModule
    from .engine.batch_size import find_executable_batch_size
    from .engine.engine import Engine
    from .engine.rank_logger import get_logger
    from .errors import CheckpointError
    from .lifecycle.processes import launch
    from .loop.generate import generate
    from .module import Module
    from .optimization.parameter_groups import parameter_groups
    from .optimization.schedules import cosine_schedule, linear_schedule, wsd_schedule
    from .optimization.tuner import Tuner
    from .seed import isolated_rng, seed_everything
    from .trainer import Trainer

_MODULES = {
    "CheckpointError": "errors",
    "CombinedLoader": "data.combined",
    "DataModule": "datamodule",
    "Engine": "engine.engine",
    "LoopwrightCLI": "cli",
    "Module": "module",
    "Trainer": "trainer",
    "cosine_schedule": "optimization.schedules",
    "Tuner": "optimization.tuner",
    "find_executable_batch_size": "engine.batch_size",
    "generate": "loop.generate",
    "get_logger": "engine.rank_logger",
    "isolated_rng": "seed",
    "launch": "lifecycle.processes",
    "linear_schedule": "optimization.schedules",
    "parameter_groups": "optimization.parameter_groups",
    "seed_everything": "seed",
    "wsd_schedule": "optimization.schedules",
}

# Without those of `cli`, which need an extra: a star imports what everybody has.
__all__ = [
    "CheckpointError",
    "CombinedLoader",
    "DataModule",
    "Engine",
    "Module",
    "Trainer",
    "Tuner",
    "cosine_schedule",
    "find_executable_batch_size",
    "generate",
    "get_logger",
    "isolated_rng",
    "launch",
    "linear_schedule",
    "parameter_groups",
    "seed_everything",
    "wsd_schedule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


if "LOOPWRIGHT_REPLAY" in os.environ:
    # `loopwright replay` has started this program: before it draws a number, its generators are those of then.
    from .report.replay import begin_program

    begin_program()
