"""Accelerate's names for parallel models."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.parallelism import (
    ParallelismConfig,
)

__all__ = [
    "ParallelismConfig",
]

__getattr__ = names_of_others(__name__)
