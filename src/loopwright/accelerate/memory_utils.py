"""Accelerate's memory functions, under their former path."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.memory import (
    find_executable_batch_size,
)

__all__ = [
    "find_executable_batch_size",
]

__getattr__ = names_of_others(__name__)
