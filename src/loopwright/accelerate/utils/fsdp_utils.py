"""Accelerate's names for FSDP."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    fsdp2_prepare_model,
)
from ...framework.compat.accelerate.fsdp_weights import (
    disable_fsdp_ram_efficient_loading,
    enable_fsdp_ram_efficient_loading,
    load_fsdp_model,
    load_fsdp_optimizer,
    merge_fsdp_weights,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from ...framework.compat.accelerate.imports import names_of_others

__all__ = [
    "disable_fsdp_ram_efficient_loading",
    "enable_fsdp_ram_efficient_loading",
    "fsdp2_prepare_model",
    "load_fsdp_model",
    "load_fsdp_optimizer",
    "merge_fsdp_weights",
    "save_fsdp_model",
    "save_fsdp_optimizer",
]

__getattr__ = names_of_others(__name__)
