"""Accelerate's names for weights that are somewhere else."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)
from ...framework.compat.accelerate.imports import names_of_others

__all__ = [
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]

__getattr__ = names_of_others(__name__)
