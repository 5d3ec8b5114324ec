"""Accelerate's schedulers."""

from __future__ import annotations

from ..framework.compat.accelerate.optimizer import (
    AcceleratedScheduler,
)

__all__ = [
    "AcceleratedScheduler",
]
