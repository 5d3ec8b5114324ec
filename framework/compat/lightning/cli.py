"""Lightning's command line, which is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..imports import unserved
from .types import LRSchedulerTypeTuple, LRSchedulerTypeUnion

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
]

ArgsType = Any
OptimizerCallable = Callable[..., torch.optim.Optimizer]
LRSchedulerCallable = Callable[..., Union[LRScheduler, ReduceLROnPlateau]]  # noqa: UP007

_LATER = "it comes in a later version; read the arguments with argparse or jsonargparse, and call the Trainer"
LightningArgumentParser = unserved("LightningArgumentParser", _LATER)
LightningCLI = unserved("LightningCLI", _LATER)
SaveConfigCallback = unserved("SaveConfigCallback", _LATER)


def instantiate_class(args: Any, init: dict[str, Any]) -> Any:
    """Make an object of ``{"class_path": …, "init_args": {…}}``.

    Args:
        args: positional arguments before those; one value or a tuple.
        init: the class's path and arguments.
    """
    from importlib import import_module

    module, _, name = init["class_path"].rpartition(".")
    positional = args if isinstance(args, tuple) else (args,)
    kind = getattr(import_module(module), name)
    return kind(*positional, **init.get("init_args", {}))
