"""Accelerate's logging."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.logging import (
    MultiProcessAdapter,
    get_logger,
)

__all__ = [
    "MultiProcessAdapter",
    "get_logger",
]

__getattr__ = names_of_others(__name__)
