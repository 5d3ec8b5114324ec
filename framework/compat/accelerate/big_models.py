"""Accelerate's names for models that are too big for one device: what is not served."""

from __future__ import annotations

from typing import Any

from .unserved import unserved

_ELSEWHERE = "there is nothing here that does the same"


# Names that programs import, and maybe do not use.

_SHARDS = (
    "FSDPStrategy shards models, and save_state writes them for any number of processes"
)
fsdp2_prepare_model = unserved("fsdp2_prepare_model", _SHARDS)
DeepSpeedEngineWrapper = unserved("DeepSpeedEngineWrapper", "DeepSpeedStrategy")
DeepSpeedOptimizerWrapper = unserved("DeepSpeedOptimizerWrapper", "DeepSpeedStrategy")
DeepSpeedSchedulerWrapper = unserved("DeepSpeedSchedulerWrapper", "DeepSpeedStrategy")

AORecipeKwargs = unserved("AORecipeKwargs", 'mixed_precision="bf16"')
BnbQuantizationConfig = unserved("BnbQuantizationConfig", _ELSEWHERE)
FP8RecipeKwargs = unserved("FP8RecipeKwargs", 'mixed_precision="bf16"')
MSAMPRecipeKwargs = unserved("MSAMPRecipeKwargs", 'mixed_precision="bf16"')
MegatronLMPlugin = unserved("MegatronLMPlugin", _SHARDS)
TERecipeKwargs = unserved("TERecipeKwargs", 'mixed_precision="bf16"')
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
        "check_tied_parameters_in_config",
        "check_tied_parameters_on_same_device",
        "contextual_fp8_autocast",
        "convert_model",
        "convert_model_to_fp8_ao",
        "deepspeed_required",
        "ensure_weights_retied",
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
