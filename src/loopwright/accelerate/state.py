"""Accelerate's states."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
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

__getattr__ = names_of_others(__name__)
