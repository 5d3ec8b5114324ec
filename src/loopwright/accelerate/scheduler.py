"""Accelerate's schedulers."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.optimizer import (
    AcceleratedScheduler,
)

__all__ = [
    "AcceleratedScheduler",
]

__getattr__ = names_of_others(__name__)
