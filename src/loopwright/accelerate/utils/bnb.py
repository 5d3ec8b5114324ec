"""Accelerate's names for quantized models."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    load_and_quantize_model,
)

__all__ = [
    "load_and_quantize_model",
]
