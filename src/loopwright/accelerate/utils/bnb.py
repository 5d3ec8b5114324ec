"""Accelerate's names for quantized models."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    load_and_quantize_model,
)
from ...framework.compat.accelerate.imports import names_of_others

__all__ = [
    "load_and_quantize_model",
]

__getattr__ = names_of_others(__name__)
