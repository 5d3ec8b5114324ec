"""Lightning's strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....strategies import STRATEGIES, Strategy
from ....strategies import DDPStrategy as NativeDDPStrategy
from ....strategies import DeepSpeedStrategy as NativeDeepSpeedStrategy
from ....strategies import FSDPStrategy as NativeFSDPStrategy
from ....strategies import SingleDeviceStrategy as NativeSingleDeviceStrategy
from ..imports import unserved
from .attached_strategy import AttachedStrategy
from .signatures import also_takes

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "StrategyRegistry",
    "XLAStrategy",
]

ParallelStrategy = Strategy

# Arguments that Lightning's strategies share, and what does the same here.
_ELSEWHERE = {
    "accelerator": "accelerator=… of the Trainer",
    "checkpoint_io": "an fsspec URL as ModelCheckpoint(dirpath=…)",
    "cluster_environment": "nothing: the launcher's environment is found",
    "model_averaging_period": "a ddp_comm_hook",
    "parallel_devices": "devices=… of the Trainer",
    "precision_plugin": "precision=… of the Trainer",
    "start_method": "nothing: a script is run again in each process, and a notebook's function is spawned",
}


def _without_lightnings(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those of Lightning that are None.

    Raises:
        NotImplementedError: for one of Lightning's that is not.
    """
    kept = {}
    for argument, value in arguments.items():
        if argument not in _ELSEWHERE:
            kept[argument] = value
        elif value is not None and argument != "start_method":
            raise NotImplementedError(
                f"{name} has no argument {argument!r} here: use {_ELSEWHERE[argument]}"
            )
    return kept


class _LightningStrategy(AttachedStrategy):
    """A strategy that was made by name is one of these classes, too, when a program asks ``isinstance``."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        native = vars(cls).get("stands_for")
        # Not by issubclass, which would ask here again.
        return NotImplemented if native is None else native in kind.__mro__


class DDPStrategy(_LightningStrategy, NativeDDPStrategy):
    """A :class:`~loopwright.strategies.DDPStrategy` that takes Lightning's arguments."""

    stands_for = NativeDDPStrategy

    @also_takes(NativeDDPStrategy.__init__)
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_without_lightnings("DDPStrategy", kwargs))


class SingleDeviceStrategy(_LightningStrategy, NativeSingleDeviceStrategy):
    """A :class:`~loopwright.strategies.SingleDeviceStrategy`; the Trainer's arguments choose the device.

    Args:
        device: accepted for familiarity, where the Trainer chooses the same.
        **kwargs: of :class:`~loopwright.strategies.SingleDeviceStrategy`.
    """

    stands_for = NativeSingleDeviceStrategy

    @also_takes(NativeSingleDeviceStrategy.__init__)
    def __init__(self, device: Any = "cpu", **kwargs: Any) -> None:
        super().__init__(**_without_lightnings("SingleDeviceStrategy", kwargs))
        self.requested_device = device


# FSDP1's names for how much is sharded, and what fully_shard calls it.
_SHARDING = {
    "FULL_SHARD": {},
    "SHARD_GRAD_OP": {"reshard_after_forward": False},
}


class FSDPStrategy(_LightningStrategy, NativeFSDPStrategy):
    """A :class:`~loopwright.strategies.FSDPStrategy` that takes Lightning's arguments.

    Args:
        sharding_strategy: ``"FULL_SHARD"`` or ``"SHARD_GRAD_OP"``.
        activation_checkpointing_policy: classes whose activations are computed again.
        state_dict_type: accepted for familiarity; a checkpoint's format is that of ``save_format``.
        **kwargs: of :class:`~loopwright.strategies.FSDPStrategy`.

    Raises:
        NotImplementedError: for another sharding strategy, or an argument that is not there.
    """

    stands_for = NativeFSDPStrategy

    @also_takes(NativeFSDPStrategy.__init__)
    def __init__(
        self,
        *,
        sharding_strategy: Any = "FULL_SHARD",
        activation_checkpointing_policy: Any = None,
        state_dict_type: str = "full",
        **kwargs: Any,
    ) -> None:
        name = getattr(sharding_strategy, "name", sharding_strategy)
        if name not in _SHARDING:
            raise NotImplementedError(
                f"sharding_strategy must be one of {', '.join(_SHARDING)}; got {name!r}. For HYBRID_SHARD, pass "
                "device_mesh=(replicas, shards); for NO_SHARD, use DDPStrategy"
            )
        if activation_checkpointing_policy is not None:
            kwargs["activation_checkpointing"] = activation_checkpointing_policy
        arguments = _without_lightnings("FSDPStrategy", kwargs)
        super().__init__(**_SHARDING[name], **arguments)


class DeepSpeedStrategy(_LightningStrategy, NativeDeepSpeedStrategy):
    """A :class:`~loopwright.strategies.DeepSpeedStrategy` that takes Lightning's arguments.

    Args:
        zero_optimization: accepted for familiarity; must be True.
        stage: 1, 2 or 3.
        offload_optimizer: keep the optimizer's state on the CPU.
        offload_parameters: keep parameters on the CPU.
        config: DeepSpeed's own configuration, a dict or a file.
        **kwargs: keys of the configuration's section ``"zero_optimization"``, and arguments of
            :class:`~loopwright.strategies.DeepSpeedStrategy`.
    """

    stands_for = NativeDeepSpeedStrategy

    @also_takes(NativeDeepSpeedStrategy.__init__)
    def __init__(
        self,
        *,
        zero_optimization: bool = True,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not zero_optimization:
            raise NotImplementedError(
                "zero_optimization must be True: without it, use DDPStrategy"
            )
        arguments = _without_lightnings("DeepSpeedStrategy", kwargs)
        own = ("activation_checkpointing", "process_group_backend", "timeout")
        options = {name: arguments.pop(name) for name in own if name in arguments}
        if arguments:
            if config is not None:
                raise NotImplementedError(
                    f"{', '.join(arguments)}: write them into config, section zero_optimization"
                )
            config = {"zero_optimization": arguments}
        super().__init__(
            None if config is not None and not arguments else stage,
            config=config,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            **options,
        )


def attach(strategy: Any, trainer: Any) -> None:
    """Give a strategy Lightning's attributes, which it takes from a Trainer.

    Args:
        strategy: of a name, or one of these classes; others stay as they are.
        trainer: which has taken it.
    """
    kinds: tuple[Any, ...] = (
        DDPStrategy,
        SingleDeviceStrategy,
        FSDPStrategy,
        DeepSpeedStrategy,
    )
    for kind in kinds:
        if type(strategy) is kind.stands_for:
            # In place, as the parts of the Trainer hold it already.
            strategy.__class__ = kind
    if isinstance(strategy, AttachedStrategy):
        strategy.attach(trainer)


class _Registry(dict[str, dict[str, Any]]):
    """Names of strategies that packages add to those of Loopwright."""

    def register(
        self,
        name: str,
        strategy: Callable[..., Strategy] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Callable[..., Any]:
        """Let ``Trainer(strategy=name)`` make a strategy.

        Args:
            name: of the strategy.
            strategy: its class; without it, this is a decorator.
            description: what it is.
            override: whether the name may be taken.
            **init_params: the class's arguments.

        Raises:
            ValueError: if the name is taken.
        """

        def add(kind: Callable[..., Strategy]) -> Callable[..., Strategy]:
            if name in self and not override:
                raise ValueError(
                    f"a strategy {name!r} is there already; pass override=True"
                )
            self[name] = {
                "strategy": kind,
                "description": description,
                "init_params": init_params,
            }
            return kind

        return add if strategy is None else add(strategy)

    def get(self, name: str, default: Any = None) -> Any:
        """A new strategy of this name; None or ``default`` if there is none."""
        entry = dict.get(self, name)
        if entry is None:
            return default
        return entry["strategy"](**entry["init_params"])

    def is_of_package(self, name: str) -> bool:
        """Whether a package has added this name."""
        return name in self and self[name] is not _BUILT_IN.get(name)

    def available_strategies(self) -> list[str]:
        """All names."""
        return list(self)

    def remove(self, name: str) -> None:
        """Forget a name."""
        del self[name]


def _built_in() -> dict[str, dict[str, Any]]:
    """The names that Lightning has, and those that are Loopwright's, as entries of the registry."""
    kinds = {
        "DDPStrategy": DDPStrategy,
        "DeepSpeedStrategy": DeepSpeedStrategy,
        "FSDPStrategy": FSDPStrategy,
        "SingleDeviceStrategy": SingleDeviceStrategy,
    }
    entries: dict[str, tuple[Any, dict[str, Any]]] = {
        name: (kinds[kind], options) for name, (kind, options) in STRATEGIES.items()
    }
    # An option that is off is not named.
    for name, (kind, options) in entries.items():
        entries[name] = kind, {key: value for key, value in options.items() if value}
    entries["single_device"] = entries["single"]
    starts = {
        "ddp": "popen",
        "ddp_spawn": "spawn",
        "ddp_fork": "fork",
        "ddp_notebook": "fork",
    }
    for name, start in starts.items():
        options = {"start_method": start}
        entries[name] = DDPStrategy, options
        for word, finds in (("false", False), ("true", True)):
            entries[f"{name}_find_unused_parameters_{word}"] = (
                DDPStrategy,
                {"find_unused_parameters": finds, **options},
            )
    return {
        name: {"strategy": kind, "description": "", "init_params": options}
        for name, (kind, options) in entries.items()
    }


_BUILT_IN = _built_in()
StrategyRegistry = _Registry(_BUILT_IN)

_DP = 'strategy="ddp" is what takes its place'
DataParallelStrategy = unserved("DataParallelStrategy", _DP)
ModelParallelStrategy = unserved(
    "ModelParallelStrategy", "FSDPStrategy(tensor_parallel_size=…)"
)
_TPU = "there is no support for TPUs"
SingleDeviceXLAStrategy = unserved("SingleDeviceXLAStrategy", _TPU)
XLAStrategy = unserved("XLAStrategy", _TPU)
