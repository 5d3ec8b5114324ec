"""Strategies: on which devices, in how many processes and in which precision a module runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Strategy
from .capabilities import Capabilities
from .precision import Precision
from .process_group import ProcessGroupOptions

if TYPE_CHECKING:
    from .ddp import DDPStrategy
    from .deepspeed import DeepSpeedStrategy
    from .fsdp import FSDPStrategy
    from .single_device import SingleDeviceStrategy

_MODULES = {
    "DDPStrategy": "ddp",
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "SingleDeviceStrategy": "single_device",
}

# What `Trainer(strategy=...)` takes beside "auto": the class behind each name, and its arguments.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("SingleDeviceStrategy", {}),
    "ddp": ("DDPStrategy", {}),
    "ddp_find_unused_parameters_true": (
        "DDPStrategy",
        {"find_unused_parameters": True},
    ),
    "fsdp": ("FSDPStrategy", {}),
    "fsdp_cpu_offload": ("FSDPStrategy", {"cpu_offload": True}),
    "deepspeed": ("DeepSpeedStrategy", {}),
    **{
        f"deepspeed_stage_{stage}": ("DeepSpeedStrategy", {"stage": stage})
        for stage in (1, 2, 3)
    },
    **{
        f"deepspeed_stage_{stage}_offload": (
            "DeepSpeedStrategy",
            {
                "stage": stage,
                "offload_optimizer": True,
                "offload_parameters": stage == 3,
            },
        )
        for stage in (1, 2, 3)
    },
}

__all__ = [
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
]


def create_strategy(strategy: str | Strategy, several: bool = False) -> Strategy:
    """Return the strategy of that name, or the object itself.

    Args:
        strategy: a key of :data:`STRATEGIES`, or ``"auto"``: ``"ddp"`` for several processes and else ``"single"``.
        several: whether there are several processes.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a name or a Strategy, got {strategy!r}")
    if strategy == "dp":
        raise ValueError(
            'strategy="dp" (torch.nn.DataParallel) is not supported: it is slow, and torch advises against it; '
            'strategy="ddp" is what takes its place'
        )
    if strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise ValueError(
            f'strategy={strategy!r}: use "ddp", which works in scripts and in notebooks alike'
        )
    name = ("ddp" if several else "single") if strategy == "auto" else strategy
    if name not in STRATEGIES:
        raise ValueError(
            f"strategy must be a Strategy, auto or one of {', '.join(STRATEGIES)}; got {strategy!r}"
        )
    kind, arguments = STRATEGIES[name]
    return __getattr__(kind)(**arguments)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
