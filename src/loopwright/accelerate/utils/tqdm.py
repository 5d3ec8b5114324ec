"""Accelerate's progress bar."""

from __future__ import annotations

from ...framework.compat.accelerate.environment import (
    tqdm,
)

__all__ = [
    "tqdm",
]
