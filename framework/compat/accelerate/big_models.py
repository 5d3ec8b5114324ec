"""Accelerate's names for models that are too big for one device: what is served, and what stands for the rest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .unserved import unserved

_SPREADS = (
    "it spreads one model over devices, CPU and disk; use loopwright.framework.Engine.dispatch_model in a program "
    "without this face, or FSDP to shard it over processes"
)
_ELSEWHERE = "there is nothing here that does the same"


def init_on_device(
    device: torch.device | str, include_buffers: bool | None = None
) -> AbstractContextManager[Any]:
    """A context in which modules are made on a device, with their buffers.

    Args:
        device: the device.
        include_buffers: accepted.
    """
    return torch.device(device)


def init_empty_weights(
    include_buffers: bool | None = None,
) -> AbstractContextManager[Any]:
    """A context in which modules are made without memory for their parameters and buffers (on ``"meta"``).

    Args:
        include_buffers: accepted.
    """
    return init_on_device("meta")


def compute_module_sizes(
    model: nn.Module, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, int]:
    """Bytes of a model's tensors, by the names of its parts; all of it is ``""``.

    Args:
        model: the model.
        dtype: in which floating-point tensors would be.
        **options: accepted.
    """
    sizes: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        size = tensor.nbytes
        if dtype is not None and tensor.is_floating_point():
            size = tensor.numel() * dtype.itemsize
        parts = name.split(".")
        for end in range(len(parts) + 1):
            prefix = ".".join(parts[:end])
            sizes[prefix] = sizes.get(prefix, 0) + size
    return sizes


def named_module_tensors(
    module: nn.Module,
    include_buffers: bool = True,
    recurse: bool = False,
    remove_non_persistent: bool = False,
) -> Any:
    """Names and tensors of a module: parameters, and buffers if they are included."""
    yield from module.named_parameters(recurse=recurse)
    if not include_buffers:
        return
    kept = module.state_dict() if remove_non_persistent else None
    for name, buffer in module.named_buffers(recurse=recurse):
        if kept is None or name in kept:
            yield name, buffer


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Groups of names under which a model has the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted([sorted(group) for group in names.values() if len(group) > 1])


def dtype_byte_size(dtype: torch.dtype) -> float:
    """Bytes of one number of this type."""
    return 1 / 8 if dtype == torch.bool else dtype.itemsize


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors have the same memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether parameters of a module are somewhere else meanwhile: not here."""
    return False


# Names that programs import, and maybe do not use.
AlignDevicesHook = unserved("AlignDevicesHook", _SPREADS)
CpuOffload = unserved("CpuOffload", _SPREADS)
LayerwiseCastingHook = unserved("LayerwiseCastingHook", _SPREADS)
ModelHook = unserved("ModelHook", "use torch's register_forward_pre_hook")
SequentialHook = unserved("SequentialHook", "use torch's register_forward_pre_hook")
UserCpuOffloadHook = unserved("UserCpuOffloadHook", _SPREADS)
add_hook_to_module = unserved("add_hook_to_module", _SPREADS)
align_module_device = unserved("align_module_device", _SPREADS)
attach_align_device_hook = unserved("attach_align_device_hook", _SPREADS)
attach_align_device_hook_on_blocks = unserved(
    "attach_align_device_hook_on_blocks", _SPREADS
)
check_device_map = unserved("check_device_map", _SPREADS)
clean_device_map = unserved("clean_device_map", _SPREADS)
cpu_offload = unserved("cpu_offload", _SPREADS)
cpu_offload_with_hook = unserved("cpu_offload_with_hook", _SPREADS)
disk_offload = unserved("disk_offload", _SPREADS)
dispatch_model = unserved("dispatch_model", _SPREADS)
get_balanced_memory = unserved("get_balanced_memory", _SPREADS)
get_max_layer_size = unserved("get_max_layer_size", _SPREADS)
get_max_memory = unserved("get_max_memory", _SPREADS)
infer_auto_device_map = unserved("infer_auto_device_map", _SPREADS)
load_offloaded_weight = unserved("load_offloaded_weight", _SPREADS)
load_offloaded_weights = unserved("load_offloaded_weights", _SPREADS)
offload_state_dict = unserved("offload_state_dict", _SPREADS)
offload_weight = unserved("offload_weight", _SPREADS)
remove_hook_from_module = unserved("remove_hook_from_module", _SPREADS)
remove_hook_from_submodules = unserved("remove_hook_from_submodules", _SPREADS)
retie_parameters = unserved("retie_parameters", _SPREADS)
save_offload_index = unserved("save_offload_index", _SPREADS)
set_module_tensor_to_device = unserved("set_module_tensor_to_device", _SPREADS)
OffloadedWeightsLoader = unserved("OffloadedWeightsLoader", _SPREADS)
PrefixedDataset = unserved("PrefixedDataset", _SPREADS)

_SHARDS = (
    "FSDPStrategy shards models, and save_state writes them for any number of processes"
)
enable_fsdp_ram_efficient_loading = unserved(
    "enable_fsdp_ram_efficient_loading", _SHARDS
)
disable_fsdp_ram_efficient_loading = unserved(
    "disable_fsdp_ram_efficient_loading", _SHARDS
)
load_fsdp_model = unserved("load_fsdp_model", _SHARDS)
load_fsdp_optimizer = unserved("load_fsdp_optimizer", _SHARDS)
merge_fsdp_weights = unserved("merge_fsdp_weights", _SHARDS)
save_fsdp_model = unserved("save_fsdp_model", _SHARDS)
save_fsdp_optimizer = unserved("save_fsdp_optimizer", _SHARDS)
fsdp2_prepare_model = unserved("fsdp2_prepare_model", _SHARDS)
DeepSpeedEngineWrapper = unserved("DeepSpeedEngineWrapper", "DeepSpeedStrategy")
DeepSpeedOptimizerWrapper = unserved("DeepSpeedOptimizerWrapper", "DeepSpeedStrategy")
DeepSpeedSchedulerWrapper = unserved("DeepSpeedSchedulerWrapper", "DeepSpeedStrategy")

AORecipeKwargs = unserved("AORecipeKwargs", 'mixed_precision="bf16"')
BnbQuantizationConfig = unserved("BnbQuantizationConfig", _ELSEWHERE)
DeepSpeedSequenceParallelConfig = unserved("DeepSpeedSequenceParallelConfig", _SHARDS)
FP8RecipeKwargs = unserved("FP8RecipeKwargs", 'mixed_precision="bf16"')
MSAMPRecipeKwargs = unserved("MSAMPRecipeKwargs", 'mixed_precision="bf16"')
MegatronLMPlugin = unserved("MegatronLMPlugin", _SHARDS)
ParallelismConfig = unserved(
    "ParallelismConfig", "FSDPStrategy has device_mesh= and tensor_parallel_size="
)
TERecipeKwargs = unserved("TERecipeKwargs", 'mixed_precision="bf16"')
TorchContextParallelConfig = unserved("TorchContextParallelConfig", _SHARDS)
TorchTensorParallelConfig = unserved("TorchTensorParallelConfig", _SHARDS)
TorchTensorParallelPlugin = unserved("TorchTensorParallelPlugin", _SHARDS)
load_and_quantize_model = unserved("load_and_quantize_model", _ELSEWHERE)
prepare_pippy = unserved("prepare_pippy", _ELSEWHERE)

_TRACKS = "write a GeneralTracker of your own; tensorboard, wandb, mlflow, trackio and comet_ml are served"
AimTracker = unserved("AimTracker", _TRACKS)
ClearMLTracker = unserved("ClearMLTracker", _TRACKS)
DVCLiveTracker = unserved("DVCLiveTracker", _TRACKS)
SwanLabTracker = unserved("SwanLabTracker", _TRACKS)


# Further names of its utilities, which programs seldom import.
_SELDOM = frozenset(
    {
        "AbstractTrainStep",
        "BertTrainStep",
        "GPTTrainStep",
        "GatheredParameters",
        "MegatronLMDummyDataLoader",
        "MegatronLMDummyScheduler",
        "PrepareForLaunch",
        "T5TrainStep",
        "add_model_config_to_megatron_parser",
        "apply_fp8_autowrap",
        "avg_losses_across_data_parallel_group",
        "calculate_maximum_sizes",
        "check_tied_parameters_in_config",
        "check_tied_parameters_on_same_device",
        "contextual_fp8_autocast",
        "convert_model",
        "convert_model_to_fp8_ao",
        "deepspeed_required",
        "ensure_weights_retied",
        "extract_submodules_state_dict",
        "filter_first_and_last_linear_layers",
        "fsdp2_apply_ac",
        "fsdp2_canonicalize_names",
        "fsdp2_load_full_state_dict",
        "fsdp2_switch_optimizer_parameters",
        "get_active_deepspeed_plugin",
        "get_cpu_distributed_information",
        "get_fsdp2_grad_scaler",
        "get_gpu_info",
        "get_grad_scaler",
        "get_mixed_precision_context_manager",
        "get_module_children_bottom_up",
        "has_4bit_bnb_layers",
        "has_ao_layers",
        "has_transformer_engine_layers",
        "install_xla",
        "map_pytorch_optim_to_deepspeed",
        "prepare_deepspeed_cmd_env",
        "prepare_multi_gpu_env",
        "prepare_sagemager_args_inputs",
        "prepare_simple_launcher_cmd_env",
        "prepare_tpu",
        "torchao_required",
        "write_basic_config",
    }
)


def seldom(name: str) -> Any:
    """What stands for one of Accelerate's utilities that programs seldom import; None if it has none of that name."""
    return unserved(name, _ELSEWHERE) if name in _SELDOM else None
