"""Accelerate's launchers."""

from __future__ import annotations

from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.launchers import (
    debug_launcher,
    notebook_launcher,
)

__all__ = [
    "debug_launcher",
    "notebook_launcher",
]

__getattr__ = names_of_others(__name__)
