"""Accelerate's names for models, big ones among them."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    align_module_device,
    check_device_map,
    clean_device_map,
    compute_module_sizes,
    dtype_byte_size,
    find_tied_parameters,
    get_balanced_memory,
    get_max_layer_size,
    get_max_memory,
    has_offloaded_params,
    id_tensor_storage,
    infer_auto_device_map,
    load_offloaded_weights,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)
from ...framework.compat.accelerate.checkpoints import (
    convert_file_size_to_int,
    load_checkpoint_in_model,
    load_state_dict,
)
from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.unserved import unserved

get_state_dict_from_offload = unserved(
    "get_state_dict_from_offload", "model.state_dict() of a model that is not offloaded"
)

__all__ = [
    "align_module_device",
    "check_device_map",
    "clean_device_map",
    "compute_module_sizes",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_state_dict_from_offload",
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
