"""Accelerate's local SGD."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.local_sgd import (
    LocalSGD,
)

__all__ = [
    "LocalSGD",
]

__getattr__ = names_of_others(__name__)
