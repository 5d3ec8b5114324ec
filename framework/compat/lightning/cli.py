"""Lightning's command line: its names, on Loopwright's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

from jsonargparse import Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ... import cli as native
from ...cli import (
    ReduceLROnPlateau,
    SaveConfigCallback,
    instantiate_class,
    instantiate_module,
)
from .core import LightningDataModule, LightningModule
from .paths import VERSION
from .trainer import Trainer
from .utilities import MisconfigurationException

__all__ = [
    "_JSONARGPARSE_SIGNATURES_AVAILABLE",
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]

# Without it, this module cannot be imported.
_JSONARGPARSE_SIGNATURES_AVAILABLE = True

# Programs evaluate these in annotations at run time.
ArgsType = Optional[Union[list[str], dict[str, Any], Namespace]]  # noqa: UP007, UP045
OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]  # noqa: UP007
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]  # noqa: UP007
LRSchedulerCallable = Callable[
    [Optimizer],
    Union[LRScheduler, ReduceLROnPlateau],  # noqa: UP007
]


class LightningArgumentParser(native.LoopwrightArgumentParser):
    """A :class:`~loopwright.framework.cli.LoopwrightArgumentParser` that reads variables which begin with ``PL_``."""

    misconfigured = MisconfigurationException

    def __init__(self, *args: Any, env_prefix: str = "PL", **kwargs: Any) -> None:
        super().__init__(*args, env_prefix=env_prefix, **kwargs)

    def add_lightning_class_args(
        self,
        lightning_class: Any,
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        return self.add_loopwright_class_args(
            lightning_class, nested_key, subclass_mode, required
        )


class LightningCLI(native.LoopwrightCLI):
    """A :class:`~loopwright.framework.LoopwrightCLI` of Lightning's classes."""

    trainer_type = Trainer
    module_type = LightningModule
    datamodule_type = LightningDataModule
    parser_type = LightningArgumentParser
    misconfigured = MisconfigurationException
    instantiator = "lightning.pytorch.cli.instantiate_module"

    def init_parser(self, **kwargs: Any) -> Any:
        """Make the parser, whose files name Lightning's version; arguments as of the base's."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={VERSION}"])
        return super().init_parser(**kwargs)
