"""Accelerate's memory functions, under their former path."""

from __future__ import annotations

from ..framework.compat.accelerate.memory import (
    find_executable_batch_size,
)

__all__ = [
    "find_executable_batch_size",
]
