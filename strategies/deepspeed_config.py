"""DeepSpeed's configuration: generated from the Trainer's arguments, and added to by the user."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deepspeed import DeepSpeedStrategy
    from .precision import Precision

# Sections of which the Trainer has its own, and where they belong.
_ELSEWHERE = {
    "optimizer": "return it from configure_optimizers",
    "scheduler": "return it from configure_optimizers",
    "checkpoint": "checkpoints are ModelCheckpoint's",
    "activation_checkpointing": "pass activation_checkpointing= to DeepSpeedStrategy",
    "torch_autocast": "pass Trainer(precision=...)",
    "data_types": "gradients are accumulated in the type that DeepSpeed chooses",
    "amp": "pass Trainer(precision=...)",
}
# The section of the configuration that switches a precision on.
_HALF = {
    "16-mixed": "fp16",
    "16-true": "fp16",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
}


def read_config(config: Any, stage: int | None) -> tuple[dict[str, Any], int]:
    """The user's part of the configuration, and the stage.

    Raises:
        ValueError: if it holds what belongs elsewhere, or another stage.
    """
    if isinstance(config, (str, os.PathLike)):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
    if not isinstance(config, (dict, type(None))):
        raise TypeError(
            f"config must be a dict, or the path of a JSON file; got {config!r}"
        )
    config = copy.deepcopy(config or {})
    for key, instead in _ELSEWHERE.items():
        if key in config:
            raise ValueError(
                f"config has a section {key!r}, which is not DeepSpeed's business here: {instead}"
            )
    zero = config.get("zero_optimization", {})
    for key in ("mics_shard_size", "zero_hpz_partition_size"):
        if key in zero:
            raise ValueError(
                f"config has zero_optimization.{key}, under which checkpoints would be wrong: leave it out"
            )
    requested = zero.get("stage", "auto")
    requested = stage if requested == "auto" else requested
    if stage is not None and requested != stage:
        raise ValueError(
            f"config says zero_optimization.stage={requested}, the strategy was asked for stage={stage}"
        )
    if requested not in (None, 1, 2, 3):
        raise ValueError(f"stage must be 1, 2 or 3; got {requested!r}")
    return config, requested or 2


def check_batches(
    config: dict[str, Any],
    batch_size: int | None,
    accumulate: int,
    world_size: int,
    clip: float | None,
) -> None:
    """Refuse sizes in the user's configuration that are not those of the run; "auto" and sizes left out are accepted.

    Raises:
        ValueError: naming the key and both values.
    """
    total = None if batch_size is None else batch_size * accumulate * world_size
    for key, value, where in (
        ("train_micro_batch_size_per_gpu", batch_size, "the loader's batch_size"),
        ("gradient_accumulation_steps", accumulate, "accumulate_grad_batches"),
        ("train_batch_size", total, "batch_size * accumulate_grad_batches * processes"),
        ("gradient_clipping", clip, "gradient_clip_val"),
    ):
        _compare(key, config.get(key, "auto"), value, where)


def _compare(key: str, requested: Any, value: Any, where: str) -> None:
    if requested != "auto" and value is not None and requested != value:
        raise ValueError(
            f'DeepSpeed\'s config says {key}={requested!r}, but {where} is {value!r}: make them equal, or say "auto"'
        )


def complete_config(
    strategy: DeepSpeedStrategy, precision: Precision
) -> dict[str, Any]:
    """The whole configuration.

    Raises:
        ValueError: for a precision that DeepSpeed lacks, or that is not the user's configuration's.
    """
    if precision.name not in (*_HALF, "32-true"):
        raise ValueError(
            f"strategy={strategy.name!r} takes precision 32-true, {', '.join(_HALF)}; got {precision.name!r}"
        )
    config = copy.deepcopy(strategy.config)
    half = _HALF.get(precision.name)
    if half == "fp16" and strategy.device.type == "cpu":
        raise ValueError(
            f"precision={precision.name!r}: DeepSpeed has no float16 on the CPU; use bf16-mixed there"
        )
    for section in ("fp16", "bf16"):
        enabled = config.setdefault(section, {}).setdefault("enabled", section == half)
        _compare(
            f"{section}.enabled",
            enabled,
            section == half,
            f"precision={precision.name!r}, with which it",
        )
        config[section]["enabled"] = section == half
    if half == "fp16":
        _set_loss_scale(config["fp16"], precision)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = strategy.stage
    for key, requested in (
        ("offload_optimizer", strategy.offload_optimizer),
        ("offload_param", strategy.offload_parameters),
    ):
        if requested:
            zero.setdefault(
                key, {"device": "cpu", "pin_memory": strategy.device.type != "cpu"}
            )
    # Which optimizers may be used is checked by the strategy, with a reason.
    config["zero_allow_untested_optimizer"] = True
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 10**9)
    # Accumulation and clipping are the loop's: what DeepSpeed sees are micro-batches, and the last one of a window.
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=0.0,
    )
    config.pop("train_batch_size", None)
    return config


def _set_loss_scale(section: dict[str, Any], precision: Precision) -> None:
    """Hand the precision's loss scale over, where it is not the default.

    Raises:
        ValueError: for one that DeepSpeed cannot have, or that is not the user's configuration's.
    """
    requested = precision.scaling()
    default = {field.name: field.default for field in fields(precision)}
    changed = {name for name, value in requested.items() if value != default[name]}
    power = math.log2(requested["init_scale"])
    if changed & {"growth_factor", "backoff_factor"} or not power.is_integer():
        raise ValueError(
            "DeepSpeed doubles and halves the loss scale, beginning with a power of 2; "
            f"precision={precision.name!r} has {requested}"
        )
    for name, key, value in (
        ("init_scale", "initial_scale_power", int(power)),
        ("growth_interval", "loss_scale_window", requested["growth_interval"]),
    ):
        if name in changed:
            _compare(
                f"fp16.{key}",
                section.setdefault(key, value),
                value,
                f"that of precision.{name}={requested[name]}",
            )
