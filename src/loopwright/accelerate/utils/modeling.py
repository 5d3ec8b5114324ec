"""Accelerate's names for models, big ones among them."""

from __future__ import annotations

from ...framework.compat.accelerate.checkpoints import (
    convert_file_size_to_int,
)
from ...framework.compat.accelerate.device_maps import (
    calculate_maximum_sizes,
    check_device_map,
    clean_device_map,
    get_balanced_memory,
    get_max_layer_size,
    get_max_memory,
    get_module_size_with_ties,
    infer_auto_device_map,
)
from ...framework.compat.accelerate.hooks import (
    align_module_device,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.loading import (
    load_checkpoint_in_model,
    load_offloaded_weights,
    load_state_dict,
)
from ...framework.compat.accelerate.tensors import (
    compute_module_sizes,
    compute_module_total_buffer_size,
    dtype_byte_size,
    find_tied_parameters,
    get_non_persistent_buffers,
    id_tensor_storage,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)

__all__ = [
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_module_size_with_ties",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]

__getattr__ = names_of_others(__name__)
