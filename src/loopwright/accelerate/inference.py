"""Accelerate's names for pipelines."""

from __future__ import annotations

from ..framework.compat.accelerate.big_models import (
    prepare_pippy,
)

__all__ = [
    "prepare_pippy",
]
