"""The names that users import: each one is a promise, so none comes or goes unnoticed."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import loopwright
from tests.programs import run_program

PUBLIC = {
    "loopwright.framework": {
        "CheckpointError",
        "CombinedLoader",
        "DataModule",
        "Engine",
        "Module",
        "Trainer",
        "cosine_schedule",
        "Tuner",
        "find_executable_batch_size",
        "generate",
        "get_logger",
        "isolated_rng",
        "launch",
        "linear_schedule",
        "parameter_groups",
        "seed_everything",
        "wsd_schedule",
    },
    "loopwright.callbacks": {
        "AdvancedProfiler",
        "BackboneFinetuning",
        "BaseFinetuning",
        "BasePredictionWriter",
        "BatchSizeFinder",
        "Callback",
        "DeviceStatsMonitor",
        "EMAWeightAveraging",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "GarbageCollection",
        "LambdaCallback",
        "LearningRateFinder",
        "LearningRateMonitor",
        "MemorySnapshot",
        "ModelCheckpoint",
        "ModelPruning",
        "ModelSummary",
        "Notify",
        "OnExceptionCheckpoint",
        "OptunaPruningCallback",
        "PredictionWriter",
        "Profiler",
        "ProgressBar",
        "PyTorchProfiler",
        "RichModelSummary",
        "RichProgressBar",
        "RichProgressBarTheme",
        "SavePretrained",
        "SimpleProfiler",
        "SpikeDetector",
        "SpikeError",
        "TQDMProgressBar",
        "ThroughputMonitor",
        "StochasticWeightAveraging",
        "Timer",
        "WeightAveraging",
    },
    "loopwright.loggers": {
        "CSVLogger",
        "CometLogger",
        "JSONLinesLogger",
        "Logger",
        "MLFlowLogger",
        "TensorBoardLogger",
        "TrackioLogger",
        "WandbLogger",
    },
    "loopwright.strategies": {
        "STRATEGIES",
        "Capabilities",
        "DDPStrategy",
        "DeepSpeedStrategy",
        "FSDPStrategy",
        "Precision",
        "ProcessGroupOptions",
        "SingleDeviceStrategy",
        "Strategy",
        "create_strategy",
    },
}
# The root offers all of them.
PUBLIC["loopwright"] = {"__version__"}.union(*PUBLIC.values())


# The Trainer: its arguments, what it does, and what callbacks, loggers and modules read of it.
TRAINER = {
    "accumulate_grad_batches",
    "auto_requeue",
    "barebones",
    "batch_idx",
    "batch_size_of",
    "benchmark",
    "call_in_run",
    "callback_metrics",
    "callbacks",
    "can_skip_step",
    "check_val_every_n_epoch",
    "checkpoint_callback",
    "checkpoint_callbacks",
    "ckpt_path",
    "compile",
    "current_epoch",
    "datamodule",
    "default_root_dir",
    "detect_anomaly",
    "deterministic",
    "device_ids",
    "early_stopping_callback",
    "early_stopping_callbacks",
    "enable_validation",
    "engine",
    "estimated_stepping_batches",
    "evaluating",
    "export",
    "fast_dev_run",
    "fingerprint",
    "fit",
    "forward_training_batches",
    "global_rank",
    "global_step",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "inference_mode",
    "interrupted",
    "is_global_zero",
    "is_last_batch",
    "is_running",
    "lightning_module",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "local_rank",
    "log_dir",
    "log_every_n_steps",
    "logged_metrics",
    "logger",
    "loggers",
    "lr_scheduler_configs",
    "max_epochs",
    "max_steps",
    "max_time",
    "micro_batch",
    "min_epochs",
    "min_steps",
    "model",
    "module",
    "node_rank",
    "num_devices",
    "num_nodes",
    "num_predict_batches",
    "num_sanity_val_batches",
    "num_sanity_val_steps",
    "num_test_batches",
    "num_tokens",
    "num_training_batches",
    "num_val_batches",
    "optimizers",
    "overfit_batches",
    "precision",
    "predict",
    "predict_batch_indices",
    "predict_dataloaders",
    "predicting",
    "print",
    "profiler",
    "progress_bar_callback",
    "progress_bar_metrics",
    "reconfigure_optimizers",
    "record",
    "record_dir",
    "plan",
    "report",
    "rehearse",
    "reload_dataloaders",
    "reload_dataloaders_every_n_epochs",
    "rewind",
    "samples_of",
    "sanity_checking",
    "save_checkpoint",
    "save_format",
    "should_stop",
    "skip_batches",
    "skip_step",
    "state",
    "strategy",
    "sync_batchnorm",
    "test",
    "test_dataloaders",
    "testing",
    "train_dataloader",
    "training",
    "use_distributed_sampler",
    "val_check_interval",
    "val_dataloaders",
    "validate",
    "validate_before_training",
    "validating",
    "world_size",
}

# What other rooms still reach through the Trainer, though it is nobody else's business. Take out what is gone.
INSIDE_THE_TRAINER = {
    "checkpoints",
    "consensus",
    "last_fit",
    "log_media",
    "log_row",
    "manual_optimizer",
    "metrics",
    "must_end_at_once",
    "run",
    "use_callbacks_of",
    "validation_follows",
    "validation_interval",
    "window_is_open",
}

ENGINE = {
    "accumulate",
    "accumulating",
    "all_gather",
    "autocast",
    "backward",
    "broadcast",
    "check_trigger",
    "clear",
    "clip_grad_norm_",
    "clip_grad_value_",
    "device",
    "device_mesh",
    "devices",
    "dispatch_model",
    "end_training",
    "free_memory",
    "gather",
    "gather_for_metrics",
    "gather_object",
    "get_state_dict",
    "get_tracker",
    "global_step",
    "gradient_accumulation_steps",
    "is_copy",
    "is_last_process",
    "is_local_main_process",
    "is_main_process",
    "load_state",
    "local_main_process_first",
    "local_process_index",
    "log",
    "loggers",
    "main_process_first",
    "no_sync",
    "num_processes",
    "on_last_process",
    "on_local_main_process",
    "on_main_process",
    "on_process",
    "pad_across_processes",
    "precision",
    "prepare",
    "print",
    "process_index",
    "reduce",
    "register_for_checkpointing",
    "register_load_state_pre_hook",
    "register_save_state_pre_hook",
    "save_model",
    "save_state",
    "scaler",
    "set_trigger",
    "skip_first_batches",
    "split_between_processes",
    "step_was_skipped",
    "strategy",
    "sync_gradients",
    "unwrap_model",
    "use_distributed_sampler",
    "wait_for_everyone",
    "wait_for_save",
}

# The same of the Engine.
INSIDE_THE_ENGINE = {
    "loop_watch",
    "convert",
    "evaluate",
    "forward",
    "start_epoch",
    "start_evaluation",
    "takes_closures",
    "accumulation",
    "all_call",
    "begin_micro_batch",
    "clip_gradients",
    "clip_together",
    "complete_gradients",
    "compute_gradients",
    "connect",
    "detect_environment",
    "end_stepped_window",
    "end_window",
    "enter_loader",
    "environment",
    "forget",
    "hang_timeout",
    "instances",
    "keep_gradients_local",
    "leave_loader",
    "load_optimizer_state",
    "load_state_pre_hooks",
    "loss_scaler",
    "moves_batches",
    "must_launch",
    "optimizer_state",
    "plain_backward",
    "plain_step",
    "prepared",
    "prepared_type",
    "running_loader",
    "save_state_pre_hooks",
    "saver",
    "scale_gradients",
    "setup_optimizers",
    "step",
    "step_prepared",
    "sync_gradients_of",
    "to_device",
    "unscale",
    "warn_incomplete",
    "watch",
    "without_gradients",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_these_public_names(package: str):
    module = import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_shows_no_other_names(package: str):
    shown = {name for name in dir(import_module(package)) if not name.startswith("_")}
    if package == "loopwright":
        shown -= {"callbacks", "framework", "loggers", "strategies"}
    assert shown == PUBLIC[package] - {"__version__"}


def test_the_root_imports_nothing_until_it_is_asked():
    program = (
        "import sys, loopwright\n"
        "print(loopwright.__version__, 'torch' in sys.modules, 'importlib.metadata' in sys.modules)\n"
        "print(loopwright.callbacks.Callback is loopwright.Callback, 'loopwright.framework' in sys.modules)\n"
        "print(loopwright.framework.Trainer is loopwright.Trainer)\n"
    )
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        version("loopwright"),
        "False",
        "False",
        "True",
        "False",
        "True",
    ]


def test_a_folder_beside_the_program_is_not_taken_for_the_package(tmp_path: Path):
    (tmp_path / "loopwright" / "framework").mkdir(parents=True)
    program = tmp_path / "program.py"
    program.write_text("import loopwright\nprint(loopwright.__file__)\n")
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == loopwright.__file__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'loopwright' has no attribute 'Trainr'"):
        _ = loopwright.Trainr


def public_names(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_a_trainer_has_these_public_names():
    names = public_names(loopwright.Trainer(barebones=True))
    assert TRAINER - names == set(), "users and packages read these"
    assert names - TRAINER - INSIDE_THE_TRAINER == set(), (
        "a name without underscore is a promise to users: list it in TRAINER, or make it private"
    )


def test_an_engine_has_these_public_names():
    names = public_names(loopwright.Engine(launch=False))
    assert ENGINE - names == set(), "users read these"
    assert names - ENGINE - INSIDE_THE_ENGINE == set(), (
        "a name without underscore is a promise to users: list it in ENGINE, or make it private"
    )
