"""Accelerate's small functions."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.other import (
    check_os_kernel,
    clean_state_dict_for_safetensors,
    convert_bytes,
    extract_model_from_parallel,
    get_pretty_name,
    has_compiled_regions,
    is_compiled_module,
    is_peft_model,
    is_port_in_use,
    load,
    merge_dicts,
    model_has_dtensor,
    recursive_getattr,
    save,
    wait_for_everyone,
)

__all__ = [
    "check_os_kernel",
    "clean_state_dict_for_safetensors",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_pretty_name",
    "has_compiled_regions",
    "is_compiled_module",
    "is_peft_model",
    "is_port_in_use",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "save",
    "wait_for_everyone",
]

__getattr__ = names_of_others(__name__)
