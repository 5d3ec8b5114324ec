"""Accelerate's states."""

from __future__ import annotations

from ..framework.compat.accelerate.options import (
    DistributedType,
)
from ..framework.compat.accelerate.state import (
    AcceleratorState,
    GradientState,
    PartialState,
    is_initialized,
)

__all__ = [
    "AcceleratorState",
    "DistributedType",
    "GradientState",
    "PartialState",
    "is_initialized",
]
