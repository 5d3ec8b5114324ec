"""Names inside of Lightning that its own tests and some packages import, and that nothing here needs."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..imports import unserved
from .availability import package_available
from .data import warning_cache

# What tells that a package is there, with the package.
_PACKAGES = {
    "_BITSANDBYTES_AVAILABLE": "bitsandbytes",
    "_CLICK_AVAILABLE": "click",
    "_DEEPSPEED_AVAILABLE": "deepspeed",
    "_HYDRA_AVAILABLE": "hydra",
    "_LITLOGGER_AVAILABLE": "litlogger",
    "_MATPLOTLIB_AVAILABLE": "matplotlib",
    "_MPI4PY_AVAILABLE": "mpi4py",
    "_ONNXSCRIPT_AVAILABLE": "onnxscript",
    "_ONNX_AVAILABLE": "onnx",
    "_PSUTIL_AVAILABLE": "psutil",
    "_REQUESTS_AVAILABLE": "requests",
    "_SKLEARN_AVAILABLE": "sklearn",
    "_TORCH_TRT_AVAILABLE": "torch_tensorrt",
    "_TRANSFORMER_ENGINE_AVAILABLE": "transformer_engine",
    "_XLA_AVAILABLE": "torch_xla",
}
_VALUES = {
    "_CPU_PERCENT": "cpu_percent",
    "_CPU_SWAP_PERCENT": "cpu_swap_percent",
    "_CPU_VM_PERCENT": "cpu_vm_percent",
    "_DDP_FORK_ALIASES": (
        "ddp_fork",
        "ddp_fork_find_unused_parameters_false",
        "ddp_fork_find_unused_parameters_true",
        "ddp_notebook",
        "ddp_notebook_find_unused_parameters_false",
        "ddp_notebook_find_unused_parameters_true",
    ),
    "_DEEPSPEED_GREATER_EQUAL_0_16": package_available("deepspeed"),
    "_KINETO_AVAILABLE": True,
    "_LITERAL_WARN": str,
    "_METADATA_FILENAME": "meta.pt",
    "_PLUGIN_INPUT": Any,
    "_PRECISION_INPUT": str,
    "_PRECISION_INPUT_STR": str,
    "_XLA_GREATER_EQUAL_2_1": False,
    "_XLA_GREATER_EQUAL_2_5": False,
    "warning_cache": warning_cache,
}

# Classes and functions.
_PARTS = frozenset(
    """
    BatchesProcessedColumn Collective CustomBarColumn CustomInfiniteTask CustomProgress CustomTimeColumn
    DataParallelStrategy DeepSpeedLayerSummary DeepSpeedSummary LightningDoublePrecisionModule LightningLSTM
    LightningTransformer MNIST MNISTDataModule MetricsTextColumn Net ProcessingSpeedColumn RegisterRecordFunction
    ScheduleWrapper SequenceSampler ServableModule ServableModuleValidator SimpleLSTM SingleDeviceCollective
    TorchCollective Transformer WikiText2 XLACheckpointIO XLAEnvironment XLAFSDPStrategy XLAPrecision
    _AcceleratorRegistry _BackwardSyncControl _BaseProgress _BatchNormXd _ClassReplacementContextManager
    _CombinationMode _Connector _DDPBackwardSyncControl _DDPForwardRedirection _DataFetcherWrapper
    _DatasetSamplerWrapper _DtypeContextManager _EmptyInit _ExponentialLR _FSDPBackwardSyncControl _FabricDataLoader
    _FabricModule _FabricOptimizer _ForwardRedirection _GlobalStateSnapshot _HandlersCompose _InfiniteBarrier
    _LRCallback _LayerRef _LazyLoadingUnpickler _LinearLR _MockOptimizer _MonotonicWindow _NotYetLoadedTensor
    _ParallelBackwardSyncControl _RedirectingUnpickler _RefreshThread _Sharded _StrategyRegistry
    __scale_batch_dump_params __scale_batch_reset_params __scale_batch_restore_params
    __verify_configure_model_configuration __verify_eval_loop_configuration __verify_manual_optimization_support
    __verify_train_val_loop_configuration __warn_dataloader_iter_limitations _add_class_path_generator
    _adjust_batch_size _align_compiled_param_names_with_module _all_gather_ddp_if_available _apply_filter
    _block_parallel_sync_behavior _call_and_handle_interrupt _call_callback_hooks _call_callbacks_load_state_dict
    _call_callbacks_on_load_checkpoint _call_callbacks_on_save_checkpoint _call_callbacks_state_dict
    _call_configure_model _call_lightning_datamodule_hook _call_lightning_module_hook _call_setup_hook
    _call_strategy_hook _call_teardown_hook _check_bad_cuda_fork _check_dataloader_iterable
    _check_lr_find_configuration _check_mixed_imports _check_scale_batch_size_configuration
    _check_tuner_configuration _class_path_from_class _clone_tensor _collect_rng_states _configure_optimizers
    _configure_schedulers_automatic_opt _configure_schedulers_manual_opt _convert_fp_tensor _convert_loaded_hparams
    _dataloader_init_kwargs_resolve_sampler _default_map_location _defaults_from_env_vars _determine_batch_limits
    _determine_lr_attr_name _determine_model_folder _determine_model_name _determine_root_gpu_device
    _extract_batch_size _find_shared_parameters _find_tensors _format_summary_table _gather_all_tensors
    _get_all_available_mps_gpus _get_dataloader_init_args_and_kwargs _get_default_dtype
    _get_default_process_group_backend_for_device _get_distributed_sampler _get_full_state_dict_context
    _get_iterables_lengths _get_module_by_path _get_sharded_state_dict_context _get_short_description
    _get_sigkill_signal _get_version _given_hyperparameters _given_hyperparameters_context
    _has_meta_device_parameters_or_buffers _init_debugging_flags _init_dist_connection
    _init_optimizers_and_lr_schedulers _init_profiler _interrupt _is_dataloader_shuffled _is_dtensor
    _is_full_checkpoint _is_imported_subclass _is_leaf_or_primitive_container _is_max_limit_reached _is_registry
    _is_sharded_checkpoint _lazy_load _lightning_get_all_attr_holders _lightning_get_first_attr_holder
    _load_distributed_checkpoint _load_state _log_device_info _log_hyperparams _lr_find _map_and_unflatten
    _materialize_distributed_module _materialize_tensors _migration_index _move_state_into _no_grad_context
    _num_cpus_available _optimizer_handles_unscaling _optimizer_to_device _optimizers_to_device _parse_env_variables
    _parse_gpu_ids _parse_loop_limits _parse_num_batches _parse_registry_model_version _parse_time_interval_seconds
    _patch_pl_to_mirror_if_necessary _pl_migrate_checkpoint _plugin_to_compute_dtype _prefix_metric_keys
    _process_dataloader _register_classes _register_ddp_comm_hook _replace_dunder_methods _request_dataloader
    _reset_dataloaders _reset_progress _resolve_overfit_batches _restricted_classmethod_impl _run_binsearch_scaling
    _run_power_scaling _scale_batch_size _select_data_fetcher _set_legacy_version _set_module_by_path
    _set_num_threads_if_needed _set_rng_states _set_sampler_epoch _set_torch_flags _set_version _should_upgrade
    _shutdown_workers_and_reset_iterator _suggested_max_num_threads _sync_ddp _sync_ddp_if_available
    _sync_module_states _tensor_has_shape _to_compiled _try_import_module _try_loop_run _unwrap_compiled
    _unwrap_objects _update_dataloader _update_n _upgrade _validate_callbacks_list
    _validate_multiple_optimizers_support _validate_optim_conf _validate_optimizers_attached _validate_scheduler_api
    _verify_dataloader_idx_requirement _verify_loop_configurations _verify_strategy_supports_compile _version
    _worker_check check_finite_loss convert_zero_checkpoint_to_fp32_state_dict deepspeed_param_size
    do_nothing_closure download_model_from_registry ds_checkpoint_dir find_model_local_ckpt_path
    get_nvidia_gpu_stats get_torchvision_model is_wrapped multiplicative prepare_for_backward remove_module_hooks
    """.split()  # noqa: SIM905 # two hundred quoted words would hide them
)

_ADVICE = "the Trainer does its work; its arguments and attributes are what there is"


@cache
def inside_of_lightning(name: str) -> Any:
    """What Lightning has by a name inside of its modules.

    Args:
        name: that a program imports from one of Lightning's paths.

    Returns:
        A value, a class that stands for what nothing serves, or None if there is nothing of this name.
    """
    if name in _VALUES:
        return _VALUES[name]
    if name in _PACKAGES:
        return package_available(_PACKAGES[name])
    if name in _PARTS:
        return unserved(name, _ADVICE)
    return None
