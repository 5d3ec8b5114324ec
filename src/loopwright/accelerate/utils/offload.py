"""Accelerate's names for weights that are somewhere else."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.offload import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    extract_submodules_state_dict,
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)

__all__ = [
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "extract_submodules_state_dict",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]

__getattr__ = names_of_others(__name__)
