"""Accelerate's optimizers."""

from __future__ import annotations

from ..framework.compat.accelerate.optimizer import (
    AcceleratedOptimizer,
)

__all__ = [
    "AcceleratedOptimizer",
]
