"""Accelerate's plugins for FSDP and DeepSpeed, and the strategies that they ask for."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ....strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from ...messages import log
from .options import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    is_true,
)

FSDP_SHARDING_STRATEGY = [
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_ZERO2",
]
FSDP_AUTO_WRAP_POLICY = ["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"]
FSDP_BACKWARD_PREFETCH = ["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]
FSDP_STATE_DICT_TYPE = ["FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"]


def group_options(handler: InitProcessGroupKwargs | None) -> dict[str, Any]:
    """The arguments of a strategy that say how the processes meet."""
    if handler is None:
        return {}
    options: dict[str, Any] = {}
    # Accelerate's default is NCCL, also where there is none.
    if handler.backend not in (None, "nccl"):
        options["process_group_backend"] = handler.backend
    if isinstance(handler.timeout, timedelta):
        options["timeout"] = handler.timeout
    return options


def ddp_strategy(
    handler: DistributedDataParallelKwargs | None, group: dict[str, Any]
) -> DDPStrategy:
    """A replica in each process, as the handler says.

    Args:
        handler: of the Accelerator's ``kwargs_handlers``.
        group: how the processes meet.
    """
    if handler is None:
        return DDPStrategy(**group)
    options = {
        name: getattr(handler, name)
        for name in (
            "broadcast_buffers",
            "bucket_cap_mb",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
        )
    }
    if handler.dim != 0:
        options["dim"] = handler.dim
    return DDPStrategy(**options, **_communication(handler), **group)


def _communication(handler: DistributedDataParallelKwargs) -> dict[str, Any]:
    """How gradients are communicated, as arguments of DDPStrategy."""
    from torch.distributed.algorithms.ddp_comm_hooks import (
        default_hooks,
        powerSGD_hook,
    )

    kind = DDPCommunicationHookType
    hooks: dict[Any, Callable[..., Any]] = {
        kind.FP16: default_hooks.fp16_compress_hook,
        kind.BF16: default_hooks.bf16_compress_hook,
        kind.POWER_SGD: powerSGD_hook.powerSGD_hook,
        kind.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
    }
    wrappers: dict[Any, Callable[..., Any]] = {
        kind.FP16: default_hooks.fp16_compress_wrapper,
        kind.BF16: default_hooks.bf16_compress_wrapper,
    }
    hook = kind(handler.comm_hook)
    if hook not in hooks:
        return {}
    options: dict[str, Any] = {"ddp_comm_hook": hooks[hook]}
    if kind(handler.comm_wrapper) in wrappers:
        options["ddp_comm_wrapper"] = wrappers[kind(handler.comm_wrapper)]
    if hook in (kind.POWER_SGD, kind.BATCHED_POWER_SGD):
        state = powerSGD_hook.PowerSGDState(None, **handler.comm_state_option)
        options["ddp_comm_state"] = state
    return options


def _from_environment(name: str, default: str) -> str:
    return os.environ.get(f"FSDP_{name}", default)


@dataclass
class _DecidedByTorch:
    """Options of FSDP's first version, which torch's ``fully_shard`` decides by itself: they have no effect."""

    backward_prefetch: Any = None
    forward_prefetch: bool | None = None
    ignored_modules: Any = None
    limit_all_gathers: bool = True
    optim_state_dict_config: Any = None
    param_init_fn: Any = None
    state_dict_config: Any = None


@dataclass
class FullyShardedDataParallelPlugin(_DecidedByTorch):
    """What FSDP shards, and how: here always by torch's ``fully_shard`` (FSDP2), as of ``FSDPStrategy``.

    What is None comes from the environment of ``accelerate launch``, else it is Accelerate's default.

    Attributes:
        fsdp_version: 1 or 2; both are served by the second.
        sharding_strategy: ``"FULL_SHARD"``, ``"SHARD_GRAD_OP"`` or ``"HYBRID_SHARD"``, and torch's enumeration.
        reshard_after_forward: free gathered parameters after the forward pass.
        mixed_precision_policy: torch's, or a dict of its arguments, or ``"fp16"``, ``"bf16"``, ``"fp32"``.
        auto_wrap_policy: ``"transformer_based_wrap"``, ``"size_based_wrap"``, ``"no_wrap"`` or a function of a module.
        cpu_offload: keep parameters in the host's memory.
        activation_checkpointing: compute the activations of wrapped modules again.
        transformer_cls_names_to_wrap: names of classes, for ``"transformer_based_wrap"``.
        min_num_params: for ``"size_based_wrap"``.
        state_dict_type: looked at by programs; ``save_state`` here writes shards that any number of processes loads.
        use_orig_params, sync_module_states, cpu_ram_efficient_loading, activation_checkpointing_offload: accepted, as
            the further ones of torch's first version, of which is said that they have no effect.
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Any = None
    cpu_offload: Any = None
    state_dict_type: Any = None
    use_orig_params: bool | None = None
    sync_module_states: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_offload: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: Any = None
    min_num_params: int | None = None

    def __post_init__(self) -> None:
        if self.fsdp_version is None:
            self.fsdp_version = int(_from_environment("VERSION", "1"))
        if self.sharding_strategy is None and self.reshard_after_forward is None:
            default = "true" if self.fsdp_version == 2 else ""
            given = _from_environment("RESHARD_AFTER_FORWARD", default)
            if given.lower() in ("true", "false"):
                self.reshard_after_forward = is_true(given)
            self.sharding_strategy = _from_environment(
                "SHARDING_STRATEGY", given if given in FSDP_SHARDING_STRATEGY else ""
            )
        for name, variable in (
            ("cpu_offload", "OFFLOAD_PARAMS"),
            ("activation_checkpointing", "ACTIVATION_CHECKPOINTING"),
        ):
            if getattr(self, name) is None:
                setattr(self, name, is_true(_from_environment(variable, "false")))
        if self.auto_wrap_policy is None:
            self.auto_wrap_policy = _from_environment("AUTO_WRAP_POLICY", "NO_WRAP")
        if self.state_dict_type is None:
            self.state_dict_type = _from_environment(
                "STATE_DICT_TYPE", "SHARDED_STATE_DICT"
            )
        names = self.transformer_cls_names_to_wrap
        names = names or _from_environment("TRANSFORMER_CLS_TO_WRAP", "")
        if isinstance(names, str):
            names = [name for name in names.split(",") if name]
        self.transformer_cls_names_to_wrap = names
        if self.min_num_params is None:
            self.min_num_params = int(_from_environment("MIN_NUM_PARAMS", "0"))

    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Wrap the modules that a model says must stay in one, if nothing else says which ones to wrap.

        Args:
            model: one of transformers', with ``_no_split_modules``.
        """
        if not self.transformer_cls_names_to_wrap:
            names = getattr(model, "_no_split_modules", None) or []
            self.transformer_cls_names_to_wrap = list(names)

    def wrap_policy(self) -> Any:
        """Which submodules are gathered by themselves, as ``FSDPStrategy`` takes it.

        Raises:
            ValueError: for a policy that there is not.
        """
        policy = self.auto_wrap_policy
        if not isinstance(policy, str):
            name = getattr(policy, "__name__", "")
            if name == "transformer_auto_wrap_policy":
                return self._wraps_classes
            if name == "size_based_auto_wrap_policy":
                return self.min_num_params
            return policy
        if policy.upper() not in FSDP_AUTO_WRAP_POLICY:
            raise ValueError(
                f"Invalid auto wrap policy: {policy}. Must be one of {FSDP_AUTO_WRAP_POLICY}"
            )
        if policy.upper() == "SIZE_BASED_WRAP":
            return self.min_num_params
        has_names = bool(self.transformer_cls_names_to_wrap)
        if policy.upper() == "TRANSFORMER_BASED_WRAP" and has_names:
            return self._wraps_classes
        # The strategy's default finds the blocks of most models.
        return None

    def _wraps_classes(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.transformer_cls_names_to_wrap

    def reshards(self) -> bool | None:
        """Whether gathered parameters are freed after the forward pass; None if nothing says so.

        Raises:
            ValueError: for a way to shard that torch's ``fully_shard`` does not have.
        """
        if isinstance(self.reshard_after_forward, bool):
            return self.reshard_after_forward
        asked = self.reshard_after_forward or self.sharding_strategy
        name = str(getattr(asked, "name", asked) or "FULL_SHARD").upper()
        if name.isdigit():
            name = FSDP_SHARDING_STRATEGY[int(name) - 1]
        if name in ("NO_SHARD", "HYBRID_SHARD_ZERO2") or (
            name not in FSDP_SHARDING_STRATEGY
        ):
            raise ValueError(
                f"sharding_strategy={name!r}: torch's fully_shard does FULL_SHARD, SHARD_GRAD_OP and HYBRID_SHARD; "
                "leave the plugin out to have a replica in each process"
            )
        return name not in ("SHARD_GRAD_OP",)

    def policy_of_precision(self) -> Any:
        """Torch's ``MixedPrecisionPolicy``; None for what the Accelerator's ``mixed_precision`` says."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = self.mixed_precision_policy
        if policy is None or isinstance(policy, MixedPrecisionPolicy):
            return policy
        if isinstance(policy, str):
            dtypes = {
                "fp16": torch.float16,
                "bf16": torch.bfloat16,
                "fp32": torch.float32,
            }
            return MixedPrecisionPolicy(dtypes[policy], dtypes[policy])
        given = policy if isinstance(policy, dict) else vars(policy)
        return MixedPrecisionPolicy(given["param_dtype"], given["reduce_dtype"])

    def offloads(self) -> bool:
        """Whether parameters are kept in the host's memory."""
        asked = self.cpu_offload
        is_policy = type(asked).__name__ == "CPUOffloadPolicy"
        return asked is True or is_policy or getattr(asked, "offload_params", False)

    def strategy(self, group: dict[str, Any]) -> FSDPStrategy:
        """The strategy that does it; ``group`` says how the processes meet."""
        ignored = [
            item.name
            for item in fields(_DecidedByTorch)
            if getattr(self, item.name) not in (None, item.default)
        ]
        if ignored:
            log.warning(
                "FullyShardedDataParallelPlugin: %s: no effect here, as torch's fully_shard (FSDP2) decides that",
                ", ".join(ignored),
            )
        policy = self.wrap_policy()
        recomputes: Any = policy if callable(policy) else is_block
        return FSDPStrategy(
            auto_wrap_policy=policy,  # type: ignore[arg-type] # a user's function, or what torch calls a policy
            activation_checkpointing=recomputes
            if self.activation_checkpointing
            else None,
            reshard_after_forward=self.reshards(),
            mp_policy=self.policy_of_precision(),
            cpu_offload=self.offloads(),
            **group,
        )


def is_block(module: nn.Module) -> bool:
    """Whether a module is a block by its name, where nothing else says which ones are."""
    name = type(module).__name__
    return name.endswith(("Block", "Layer", "DecoderLayer", "EncoderLayer"))


class HfDeepSpeedConfig:
    """A DeepSpeed configuration whose values are found by dotted names.

    Args:
        config_file_or_dict: a dict, or a JSON file.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, config_file_or_dict: Any) -> None:
        if isinstance(config_file_or_dict, dict):
            self.config: dict[str, Any] = copy.deepcopy(config_file_or_dict)
        elif os.path.exists(config_file_or_dict):
            with open(config_file_or_dict, encoding="utf-8") as file:
                self.config = json.load(file)
        else:
            raise ValueError(
                "Expected a string path to an existing deepspeed config, or a dictionary, or a base64 encoded string. "
                f"Received: {config_file_or_dict}"
            )
        self.set_stage_and_offload()

    def set_stage_and_offload(self) -> None:
        """Read the stage and what is offloaded."""
        self._stage = self.get_value("zero_optimization.stage", -1)
        devices = {
            self.get_value(f"zero_optimization.offload_{what}.device")
            for what in ("optimizer", "param")
        }
        self._offload = bool(devices & {"cpu", "nvme"})

    def find_config_node(self, ds_key_long: str) -> tuple[Any, str]:
        """The dict that holds a dotted name's value, if there is one, and the last part of the name."""
        *path, key = ds_key_long.split(".")
        node: Any = self.config
        for part in path:
            node = node.get(part)
            if node is None:
                return None, key
        return node, key

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of a dotted name."""
        node, key = self.find_config_node(ds_key_long)
        return default if node is None else node.get(key, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Take out a dotted name.

        Raises:
            ValueError: with ``must_exist``, if it is not there.
        """
        node, key = self.find_config_node(ds_key_long)
        if node is None or key not in node:
            if must_exist:
                raise ValueError(
                    f"Can't find {ds_key_long} entry in the config: {self.config}"
                )
            return
        del node[key]

    def is_true(self, ds_key_long: str) -> bool:
        """Whether a value is there and says yes."""
        value = self.get_value(ds_key_long)
        return value is not None and bool(value)

    def is_false(self, ds_key_long: str) -> bool:
        """Whether a value is there and says no."""
        value = self.get_value(ds_key_long)
        return value is not None and not bool(value)

    def is_zero2(self) -> bool:
        """Whether the stage is 2."""
        return self._stage == 2

    def is_zero3(self) -> bool:
        """Whether the stage is 3."""
        return self._stage == 3

    def is_offload(self) -> bool:
        """Whether something is kept in the host's memory or on disk."""
        return self._offload


# What the Accelerator knows, and DeepSpeed's configuration need not say.
_KNOWN_BY_US = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "fp16",
    "bf16",
)


@dataclass
class DeepSpeedPlugin:
    """How DeepSpeed trains a model, as of ``DeepSpeedStrategy``.

    What is None comes from the environment of ``accelerate launch``, else it is Accelerate's default.

    Attributes:
        hf_ds_config: a DeepSpeed configuration: a dict, a JSON file, or a :class:`HfDeepSpeedConfig`.
        gradient_accumulation_steps: batches for each optimizer step.
        gradient_clipping: the largest norm of a step's gradients.
        zero_stage: 1, 2 or 3.
        is_train_batch_min: accepted; the training loader's batch size is the one that counts here.
        offload_optimizer_device, offload_param_device: ``"none"``, ``"cpu"`` or ``"nvme"``.
        offload_optimizer_nvme_path, offload_param_nvme_path: for ``"nvme"``.
        zero3_init_flag, zero3_save_16bit_model, transformer_moe_cls_names, enable_msamp, msamp_opt_level: accepted.
        selected: whether it is the one in force, where there are several.
    """

    hf_ds_config: Any = None
    gradient_accumulation_steps: Any = None
    gradient_clipping: Any = None
    zero_stage: int | None = None
    is_train_batch_min: bool = True
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: bool | None = None
    msamp_opt_level: str | None = None

    def __post_init__(self) -> None:
        self.selected = False
        asked = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if self.hf_ds_config is None and asked != "none":
            self.hf_ds_config = asked
        self._read_environment()
        if self.hf_ds_config is None:
            self.hf_ds_config = self._own_config()
        if not isinstance(self.hf_ds_config, HfDeepSpeedConfig):
            self.hf_ds_config = HfDeepSpeedConfig(self.hf_ds_config)
        config = self.hf_ds_config
        if "zero_optimization" not in config.config:
            raise ValueError(
                "Please specify the ZeRO optimization config in the DeepSpeed config."
            )
        config.config.setdefault(
            "gradient_accumulation_steps", self.gradient_accumulation_steps
        )
        for name, key in (
            ("zero_stage", "zero_optimization.stage"),
            ("gradient_clipping", "gradient_clipping"),
            ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ):
            value = config.get_value(key)
            if value not in (None, "auto"):
                setattr(self, name, value)
        self.deepspeed_config = config.config

    def _read_environment(self) -> None:
        asked = os.environ
        if self.zero_stage is None:
            self.zero_stage = int(asked.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        if self.gradient_accumulation_steps is None:
            steps = asked.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
            self.gradient_accumulation_steps = int(steps) if steps.isdigit() else steps
        if self.gradient_clipping is None:
            clip = asked.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
            self.gradient_clipping = clip if clip == "auto" else float(clip)
        for what in ("offload_optimizer_device", "offload_param_device"):
            if getattr(self, what) is None:
                variable = f"ACCELERATE_DEEPSPEED_{what.upper()}"
                setattr(self, what, asked.get(variable, "none"))

    def _own_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.zero_stage}
        for what in ("optimizer", "param"):
            device = getattr(self, f"offload_{what}_device")
            zero[f"offload_{what}"] = {
                "device": device,
                "nvme_path": getattr(self, f"offload_{what}_nvme_path"),
            }
        return {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.gradient_clipping,
            "zero_optimization": zero,
        }

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The configuration's value of a dotted name."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether the configuration says ``"auto"`` for a dotted name."""
        return self.get_value(ds_key_long) == "auto"

    def select(self, selected: bool = True) -> None:
        """Let it be the one in force, or not."""
        self.selected = selected

    def strategy(self, group: dict[str, Any]) -> Strategy:
        """The strategy that does it; ``group`` says how the processes meet.

        Raises:
            ValueError: for stage 0.
        """
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(
                f"zero_stage={self.zero_stage!r}: DeepSpeed shards at the stages 1, 2 and 3; leave the plugin out to "
                "have a replica in each process"
            )
        config = _without_auto(self.deepspeed_config)
        for name in _KNOWN_BY_US:
            config.pop(name, None)
        zero = config.get("zero_optimization", {})
        for what in ("offload_optimizer", "offload_param"):
            if zero.get(what, {}).get("device", "none") == "none":
                zero.pop(what, None)
        return DeepSpeedStrategy(self.zero_stage, config=config, **group)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration without what it leaves open."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found[name] = _without_auto(value)
        elif value not in ("auto", None):
            found[name] = value
    return found


class DummyOptim:
    """Stands for the optimizer that DeepSpeed's configuration describes.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, where the configuration says ``"auto"``.
        weight_decay: the same.
        **kwargs: further arguments of the optimizer.
    """

    def __init__(
        self, params: Any, lr: float = 0.001, weight_decay: float = 0.0, **kwargs: Any
    ) -> None:
        self.params = list(params)
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs
        groups = self.params
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": self.params}]
        # Schedulers may be made before the optimizer is.
        self.param_groups = [{"lr": lr, **group} for group in groups]


class DummyScheduler:
    """Stands for the scheduler that DeepSpeed's configuration describes.

    Args:
        optimizer: a :class:`DummyOptim` or an optimizer.
        total_num_steps: of the training, where the configuration says ``"auto"``.
        warmup_num_steps: in which the learning rate rises, where it says ``"auto"``.
        lr_scheduler_callable: makes a scheduler of the optimizer instead.
        **kwargs: not looked at.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs


def configured_optimizer(dummy: DummyOptim, config: dict[str, Any]) -> Optimizer:
    """The optimizer that a DeepSpeed configuration describes.

    Args:
        dummy: stands for it.
        config: the configuration.

    Raises:
        ValueError: if it describes none, or one that torch does not have.
    """
    section = config.get("optimizer", {"type": "AdamW"})
    kinds = {
        "adam": torch.optim.AdamW,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
    }
    kind = kinds.get(str(section.get("type")).lower())
    if kind is None:
        raise ValueError(
            f"DeepSpeed's config asks for the optimizer {section.get('type')!r}: of such, {', '.join(kinds)} are "
            "served; or make the optimizer yourself, and leave that section out"
        )
    options = {"lr": dummy.lr, "weight_decay": dummy.weight_decay, **dummy.kwargs}
    options |= _without_auto(section.get("params", {}))
    for name in ("torch_adam", "adam_w_mode"):
        options.pop(name, None)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return kind(dummy.params, **options)


def configured_scheduler(
    dummy: DummyScheduler, optimizer: Any, config: dict[str, Any], processes: int
) -> Any:
    """The scheduler that a DeepSpeed configuration describes.

    Args:
        dummy: stands for it.
        optimizer: the optimizer itself.
        config: the configuration.
        processes: how many there are: each step counts for all of them.

    Raises:
        ValueError: if it describes one that is not served.
    """
    if dummy.lr_scheduler_callable is not None:
        return dummy.lr_scheduler_callable(optimizer)
    section = config.get("scheduler", {"type": "WarmupLR"})
    kind = section.get("type")
    if kind not in ("WarmupLR", "WarmupDecayLR"):
        raise ValueError(
            f"DeepSpeed's config asks for the scheduler {kind!r}: WarmupLR and WarmupDecayLR are served; or make the "
            "scheduler yourself, and leave that section out"
        )
    params = _without_auto(section.get("params", {}))
    warmup = int(params.get("warmup_num_steps", dummy.warmup_num_steps or 0))
    total = params.get("total_num_steps", dummy.total_num_steps)
    top = [group["lr"] for group in optimizer.param_groups]
    highest = params.get("warmup_max_lr", max(top))
    lowest = params.get("warmup_min_lr", 0.0)

    def rate(step: int) -> float:
        if step < warmup:
            return (lowest + (highest - lowest) * step / max(1, warmup)) / highest
        if kind == "WarmupLR" or not total:
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup))

    for group in optimizer.param_groups:
        group["lr"] = highest
        group.pop("initial_lr", None)
    return LambdaLR(optimizer, rate)
