"""Accelerate's names for pipelines."""

from __future__ import annotations

from ..framework.compat.accelerate.big_models import (
    prepare_pippy,
)
from ..framework.compat.accelerate.imports import names_of_others

__all__ = [
    "prepare_pippy",
]

__getattr__ = names_of_others(__name__)
