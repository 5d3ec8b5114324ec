"""Arguments that have another name here, or had another one in Lightning 1: what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...arguments import ELSEWHERE
from .names import Target

# What is made of an argument: arguments by name, each with the text of its value.
Arguments = dict[str, str]


class Keyword(NamedTuple):
    """An argument that is called otherwise here.

    Attributes:
        make: what it becomes, from the text of its value; None where that depends on what the value is when it runs.
        target: for which kind of rewriting; empty for both.
    """

    make: Callable[[str], Arguments | None]
    target: str = ""


def _renamed(name: str) -> Callable[[str], Arguments]:
    return lambda value: {name: value}


def _switch(name: str, values: dict[str, str]) -> Callable[[str], Arguments | None]:
    """An argument that becomes ``name``, with another value for each of ``values``."""

    def make(value: str) -> Arguments | None:
        return {name: values[value]} if value in values else None

    return make


def _truth(name: str) -> Callable[[str], Arguments | None]:
    return _switch(name, {"True": "True", "False": "False"})


def _texts(values: dict[str, str]) -> dict[str, str]:
    """The same with both kinds of quotes."""
    found = dict(values)
    for old, new in values.items():
        found[old.replace('"', "'")] = new
    return found


def _gpus(value: str) -> Arguments | None:
    """Lightning 1's ``gpus``: a number, -1, a list, or a text of them; 0 and None mean the CPU."""
    if value in ("0", "None"):
        return {"accelerator": '"cpu"'}
    plain = value.lstrip("-").isdecimal() or value.startswith(("[", '"', "'"))
    return {"accelerator": '"gpu"', "devices": value} if plain else None


def _cpu(value: str) -> Arguments | None:
    """Accelerate's ``cpu``."""
    return {"True": {"accelerator": '"cpu"'}, "False": {}}.get(value)


_STRATEGY_NAMES = _texts(
    {
        '"ddp"': '"ddp"',
        '"ddp2"': '"ddp"',
        '"ddp_spawn"': '"ddp"',
        '"ddp_cpu"': '"ddp"',
    }
)
_SPAWNED = _texts(
    {
        '"ddp_spawn"': '"ddp"',
        '"ddp_fork"': '"ddp"',
        '"ddp_notebook"': '"ddp"',
        '"ddp_spawn_find_unused_parameters_false"': '"ddp"',
        '"ddp_find_unused_parameters_false"': '"ddp"',
        '"ddp_spawn_find_unused_parameters_true"': '"ddp_find_unused_parameters_true"',
        '"ddp_notebook_find_unused_parameters_true"': '"ddp_find_unused_parameters_true"',
    }
)
_PRECISIONS = _texts(
    {
        '"no"': '"32-true"',
        '"fp16"': '"16-mixed"',
        '"bf16"': '"bf16-mixed"',
    }
)

TRAINER = {
    "accelerator": Keyword(_switch("strategy", _STRATEGY_NAMES)),
    "checkpoint_callback": Keyword(_truth("enable_checkpointing")),
    "distributed_backend": Keyword(_switch("strategy", _STRATEGY_NAMES)),
    "gpus": Keyword(_gpus),
    "max_nb_epochs": Keyword(_renamed("max_epochs")),
    "min_nb_epochs": Keyword(_renamed("min_epochs")),
    "nb_gpu_nodes": Keyword(_renamed("num_nodes")),
    "num_processes": Keyword(_renamed("devices")),
    "progress_bar_refresh_rate": Keyword(
        _switch("enable_progress_bar", {"0": "False"})
    ),
    "reload_dataloaders_every_epoch": Keyword(
        _switch("reload_dataloaders_every_n_epochs", {"True": "1", "False": "0"})
    ),
    "replace_sampler_ddp": Keyword(_renamed("use_distributed_sampler")),
    "strategy": Keyword(_switch("strategy", _SPAWNED), "native"),
    "terminate_on_nan": Keyword(_renamed("detect_anomaly")),
    "test_percent_check": Keyword(_renamed("limit_test_batches")),
    "train_percent_check": Keyword(_renamed("limit_train_batches")),
    "val_percent_check": Keyword(_renamed("limit_val_batches")),
    "weights_summary": Keyword(
        _switch("enable_model_summary", _texts({"None": "False", '"top"': "True"}))
    ),
}
ENGINE = {
    "cpu": Keyword(_cpu, "native"),
    "fp16": Keyword(
        _switch("precision", {"True": '"16-mixed"', "False": '"32-true"'}), "native"
    ),
    "mixed_precision": Keyword(_switch("precision", _PRECISIONS), "native"),
}
# Methods of a Trainer whose arguments had other names.
FIT = {
    "train_dataloader": Keyword(_renamed("train_dataloaders")),
    "val_dataloader": Keyword(_renamed("val_dataloaders")),
}
TEST = {"test_dataloaders": Keyword(_renamed("dataloaders"))}
VALIDATE = {"val_dataloaders": Keyword(_renamed("dataloaders"))}
METHODS = {"fit": FIT, "test": TEST, "validate": VALIDATE}
TABLES = {"Trainer": TRAINER, "Accelerator": ENGINE, **METHODS}

# Arguments of Lightning 2's Trainer and of Accelerate's Accelerator that the native ones have not.
GONE = {
    "Trainer": ("plugins", "model_registry"),
    "Accelerator": (
        "dataloader_config",
        "deepspeed_plugin",
        "deepspeed_plugins",
        "device_placement",
        "dispatch_batches",
        "dynamo_backend",
        "dynamo_plugin",
        "even_batches",
        "fsdp_plugin",
        "gradient_accumulation_plugin",
        "kwargs_handlers",
        "log_with",
        "megatron_lm_plugin",
        "parallelism_config",
        "project_config",
        "project_dir",
        "rng_types",
        "split_batches",
        "step_scheduler_with_optimizer",
        "use_seedable_sampler",
    ),
}
# Arguments of Lightning 1's Trainer that its second version has not either.
GONE_BEFORE = (
    "amp_backend",
    "amp_level",
    "auto_lr_find",
    "auto_scale_batch_size",
    "auto_select_gpus",
    "early_stop_callback",
    "flush_logs_every_n_steps",
    "ipus",
    "log_gpu_memory",
    "move_metrics_to_cpu",
    "multiple_trainloader_mode",
    "prepare_data_per_node",
    "process_position",
    "resume_from_checkpoint",
    "stochastic_weight_avg",
    "sync_batchnorm_backend",
    "tpu_cores",
    "track_grad_norm",
    "truncated_bptt_steps",
    "weights_save_path",
)
_FURTHER_ADVICE = {
    "ipus": "nothing: IPUs are not supported",
    "log_gpu_memory": "torch.cuda.memory_summary in a callback",
    "model_registry": "nothing",
    "move_metrics_to_cpu": "nothing to ask for",
    "prepare_data_per_node": "nothing: prepare_data runs once on each machine",
    "process_position": "nothing",
    "track_grad_norm": "self.log of the norm in on_before_optimizer_step",
    "truncated_bptt_steps": "a loop over the parts in training_step, with manual optimization",
}


def convert(callee: str, keyword: str, value: str, target: Target) -> Arguments | None:
    """Return what an argument becomes.

    Args:
        callee: what is called: ``"Trainer"``, ``"Accelerator"``, or a method of a Trainer.
        keyword: the argument's name.
        value: the text of its value.
        target: as of :func:`~.names.translate`.

    Returns:
        Arguments that take its place; None if it stays as it is.
    """
    entry = TABLES.get(callee, {}).get(keyword)
    if entry is None or entry.target not in ("", target):
        return None
    return entry.make(value)


def advice(callee: str, keyword: str, target: Target) -> str:
    """Return what to do about an argument that stays as it is, and that is not taken here; else an empty text."""
    table = TABLES.get(callee, {})
    gone = GONE_BEFORE if callee == "Trainer" else ()
    if target == "native":
        gone += GONE.get(callee, ())
    # Such an accelerator or strategy is one of ours by name.
    own = ("accelerator", "strategy")
    in_table = (
        keyword in table
        and keyword not in own
        and table[keyword].target in ("", target)
    )
    if keyword not in gone and not in_table:
        return ""
    return ELSEWHERE.get(keyword, _FURTHER_ADVICE.get(keyword, "not there"))
