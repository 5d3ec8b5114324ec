"""Lightning's names for types of arguments and results."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Protocol, TypedDict, Union, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import NotRequired, Required

from ...loop.optimizers import LRSchedulerConfig

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "_DEVICE",
    "_EVALUATE_OUTPUT",
    "_MAP_LOCATION_TYPE",
    "_METRIC",
    "_NUMBER",
    "_PARAMETERS",
    "_PATH",
    "_PREDICT_OUTPUT",
    "CollectibleGroup",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "Optimizable",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
    "Steppable",
    "_Stateful",
]

# Programs evaluate these in annotations at run time, some of them by `typing.get_type_hints`.
STEP_OUTPUT = Optional[Union[Tensor, Mapping[str, Any]]]  # noqa: UP007, UP045
TRAIN_DATALOADERS = Any
EVAL_DATALOADERS = Any
_NUMBER = Union[int, float]  # noqa: UP007
_METRIC = Any
_PATH = Union[str, "os.PathLike[str]"]
_DEVICE = Union[torch.device, str, int]  # noqa: UP007
_MAP_LOCATION_TYPE = Optional[  # noqa: UP045
    Union[_DEVICE, Callable[..., Any], dict[Any, Any]]  # noqa: UP007
]
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_PREDICT_OUTPUT = Union[list[Any], list[list[Any]]]  # noqa: UP007

_PARAMETERS = Any
CollectibleGroup = Any

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]  # noqa: UP007
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]  # noqa: UP007
LRSchedulerPLType = LRSchedulerTypeUnion


@runtime_checkable
class _Stateful(Protocol):
    """What can be saved and loaded."""

    def state_dict(self) -> Any:
        """What to save."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Take back what :meth:`state_dict` returned."""


@runtime_checkable
class Steppable(Protocol):
    """What steps."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step."""


class Optimizable(Protocol):
    """What steps like an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters."""


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler, and when it steps, as ``configure_optimizers`` returns it."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer, as ``configure_optimizers`` returns it."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """An optimizer with its scheduler, as ``configure_optimizers`` returns them."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: NotRequired[str]


OptimizerLRScheduler = Optional[  # noqa: UP045
    Union[  # noqa: UP007
        Optimizer,
        Sequence[Optimizer],
        tuple[Sequence[Optimizer], Sequence[Any]],
        OptimizerConfig,
        OptimizerLRSchedulerConfig,
        Sequence[OptimizerConfig],
        Sequence[OptimizerLRSchedulerConfig],
    ]
]
