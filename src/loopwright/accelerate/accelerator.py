"""Accelerate's Accelerator."""

from __future__ import annotations

from ..framework.compat.accelerate.accelerator import (
    Accelerator,
)
from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.options import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)

__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "DataLoaderConfiguration",
    "DistributedType",
    "GradientAccumulationPlugin",
    "ProjectConfiguration",
]

__getattr__ = names_of_others(__name__)
