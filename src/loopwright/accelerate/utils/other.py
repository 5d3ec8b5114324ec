"""Accelerate's small functions."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.other import (
    check_os_kernel,
    clean_state_dict_for_safetensors,
    compile_regions,
    compile_regions_deepspeed,
    compile_regions_fsdp2,
    convert_bytes,
    extract_model_from_parallel,
    get_model_tp_size,
    get_pretty_name,
    has_compiled_regions,
    has_repeated_blocks,
    is_compiled_module,
    is_peft_model,
    is_port_in_use,
    is_repeated_blocks,
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
    "compile_regions",
    "compile_regions_deepspeed",
    "compile_regions_fsdp2",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_model_tp_size",
    "get_pretty_name",
    "has_compiled_regions",
    "has_repeated_blocks",
    "is_compiled_module",
    "is_peft_model",
    "is_port_in_use",
    "is_repeated_blocks",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "save",
    "wait_for_everyone",
]

__getattr__ = names_of_others(__name__)
