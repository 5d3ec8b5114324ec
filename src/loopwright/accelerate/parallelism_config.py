"""Accelerate's names for parallel models."""

from __future__ import annotations

from ..framework.compat.accelerate.big_models import (
    ParallelismConfig,
)

__all__ = [
    "ParallelismConfig",
]
