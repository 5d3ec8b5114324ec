"""Accelerate's questions about what is installed: ``is_deepspeed_available()`` and so on."""

from __future__ import annotations

from typing import Any

from ...framework.compat.accelerate.environment import (
    availability,
    compare_versions,
    is_torch_version,
    str_to_bool,
)

FUNCTIONS = availability()

__all__ = ["FUNCTIONS", "compare_versions", "is_torch_version", "str_to_bool"]


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
