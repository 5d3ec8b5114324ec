"""Accelerate's memory functions."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.memory import (
    clear_device_cache,
    find_executable_batch_size,
    release_memory,
    should_reduce_batch_size,
)

__all__ = [
    "clear_device_cache",
    "find_executable_batch_size",
    "release_memory",
    "should_reduce_batch_size",
]

__getattr__ = names_of_others(__name__)
