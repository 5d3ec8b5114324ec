"""Accelerate's comparison of versions."""

from __future__ import annotations

from ...framework.compat.accelerate.environment import (
    compare_versions,
    is_torch_version,
)
from ...framework.compat.accelerate.imports import names_of_others

__all__ = [
    "compare_versions",
    "is_torch_version",
]

__getattr__ = names_of_others(__name__)
