"""Accelerate's local SGD."""

from __future__ import annotations

from ..framework.compat.accelerate.local_sgd import (
    LocalSGD,
)

__all__ = [
    "LocalSGD",
]
