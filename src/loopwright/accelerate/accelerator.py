"""Accelerate's Accelerator."""

from __future__ import annotations

from ..framework.compat.accelerate.accelerator import (
    Accelerator,
)
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
