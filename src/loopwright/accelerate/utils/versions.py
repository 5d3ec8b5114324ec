"""Accelerate's comparison of versions."""

from __future__ import annotations

from ...framework.compat.accelerate.environment import (
    compare_versions,
    is_torch_version,
)

__all__ = [
    "compare_versions",
    "is_torch_version",
]
