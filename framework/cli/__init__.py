"""A command line of a program of one's own: its model, data and Trainer, from options and YAML files."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("jsonargparse") is None:
    raise ModuleNotFoundError(
        "LoopwrightCLI needs jsonargparse: pip install 'loopwright[cli]'"
    )

from ..checkpoint.class_paths import instantiate_module
from .cli import LoopwrightCLI
from .optimizers import ReduceLROnPlateau, instantiate_class
from .parser import LoopwrightArgumentParser
from .save_config import SaveConfigCallback

__all__ = [
    "LoopwrightArgumentParser",
    "LoopwrightCLI",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]
