"""Accelerate's questions about the environment."""

from __future__ import annotations

from ...framework.compat.accelerate.environment import (
    are_libraries_initialized,
    check_cuda_fp8_capability,
    check_cuda_p2p_ib_support,
    convert_dict_to_env_variables,
    get_current_device_type,
    get_int_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
    purge_accelerate_environment,
    set_numa_affinity,
    str_to_bool,
)
from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.options import (
    clear_environment,
)
from ...framework.compat.accelerate.state import (
    patch_environment,
)

__all__ = [
    "are_libraries_initialized",
    "check_cuda_fp8_capability",
    "check_cuda_p2p_ib_support",
    "clear_environment",
    "convert_dict_to_env_variables",
    "get_current_device_type",
    "get_int_from_env",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "purge_accelerate_environment",
    "set_numa_affinity",
    "str_to_bool",
]

__getattr__ = names_of_others(__name__)
