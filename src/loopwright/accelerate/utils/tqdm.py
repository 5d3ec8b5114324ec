"""Accelerate's progress bar."""

from __future__ import annotations

from ...framework.compat.accelerate.environment import (
    tqdm,
)
from ...framework.compat.accelerate.imports import names_of_others

__all__ = [
    "tqdm",
]

__getattr__ = names_of_others(__name__)
