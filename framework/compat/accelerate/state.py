"""Accelerate's shared states: what the processes are, how they compute, and where accumulation stands.

All instances of one of these classes have the same attributes, in ``_shared_state``, until ``_reset_state()``.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ....strategies import DDPStrategy
from ....strategies.launch.environment import detect_environment
from ...engine.accelerate_launch import reads_itself
from ...engine.engine import Engine
from .options import (
    DistributedType,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    is_true,
)

# What speaks for the processes where no Accelerator does; one for each kind of device.
_engines: dict[str, Engine] = {}


def asks_for(variable: str) -> bool:
    """Whether a variable of the environment says yes."""
    return is_true(os.environ.get(variable) or "no")


def devices_of_processes() -> str | int | list[int]:
    """The ``devices`` of an Engine that starts no processes: without a launcher, one."""
    if detect_environment() is not None:
        return "auto"
    chosen = _chosen_device()
    if chosen is None or chosen.type == "cpu" or chosen.index is None:
        return 1
    return [chosen.index] if chosen.index < torch.accelerator.device_count() else 1


def _chosen_device() -> torch.device | None:
    """The device that ``ACCELERATE_TORCH_DEVICE`` names."""
    name = os.environ.get("ACCELERATE_TORCH_DEVICE")
    return torch.device(name) if name else None


def _engine_for(accelerator: str, **options: Any) -> Engine:
    """The Engine of the processes, made once."""
    if accelerator not in _engines:
        with reads_itself():
            _engines[accelerator] = Engine(
                accelerator=accelerator,
                devices=devices_of_processes(),
                strategy=DDPStrategy(**options),
                debug=asks_for("ACCELERATE_DEBUG_MODE"),
            )
    return _engines[accelerator]


def _type_of(engine: Engine) -> DistributedType:
    if engine.num_processes == 1:
        return DistributedType.NO
    kind = engine.device.type
    name = "GPU" if kind == "cuda" else kind.upper()
    return DistributedType(f"MULTI_{name}")


class PartialState:
    """Which process this is, and what processes do together.

    Args:
        cpu: compute on the CPU (default: as ``accelerate launch`` says).
        **kwargs: ``backend`` and ``timeout`` of the process group.

    Attributes:
        device: this process's device.
        distributed_type: how the processes work together.
        num_processes, process_index, local_process_index: which process this is.
        backend: of torch's process group; None with one process.
        debug: compare what processes give to collectives, before they are called.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attributes = (
        "_cpu",
        "_accelerator",
        "backend",
        "debug",
        "device",
        "distributed_type",
        "fork_launched",
        "local_process_index",
        "num_processes",
        "process_index",
    )

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            return
        self._cpu = bool(cpu) or asks_for("ACCELERATE_USE_CPU")
        self._accelerator = "cpu" if self._cpu else "auto"
        options = {
            "process_group_backend": kwargs.get("backend"),
            "timeout": kwargs.get("timeout"),
        }
        given = {name: value for name, value in options.items() if value is not None}
        engine = _engine_for(self._accelerator, **given)
        self.debug = asks_for("ACCELERATE_DEBUG_MODE")
        self.fork_launched = asks_for("FORK_LAUNCHED")
        self.device = _chosen_device() or engine.device
        self.num_processes = engine.num_processes
        self.process_index = engine.process_index
        self.local_process_index = engine.local_process_index
        self.distributed_type = _type_of(engine)
        self.backend = None
        if engine.num_processes > 1:
            self.backend = torch.distributed.get_backend()

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        return (
            f"Distributed environment: {self.distributed_type.value}{backend}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    def __getattr__(self, name: str) -> Any:
        if name in self._known_attributes:
            raise AttributeError(_not_there("PartialState", name))
        raise AttributeError(f"'PartialState' object has no attribute '{name}'")

    @staticmethod
    def _reset_state() -> None:
        """Forget what all instances share: the next one reads the environment anew."""
        PartialState._shared_state.clear()

    @property
    def engine(self) -> Engine:
        """What speaks for the processes."""
        return _engine_for(self._accelerator)

    @property
    def initialized(self) -> bool:
        """Whether there has been an instance."""
        return self._shared_state != {}

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.distributed_type != DistributedType.NO and self.num_processes > 1

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process."""
        return self.process_index == self.num_processes - 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is its machine's process 0."""
        return self.local_process_index == 0

    @property
    def default_device(self) -> torch.device:
        """The device of one process of this machine."""
        accelerator = torch.accelerator.current_accelerator()
        return accelerator or torch.device("cpu")

    def set_device(self) -> None:
        """Find this process's device, as the constructor has done."""
        self.device = self.engine.device

    def wait_for_everyone(self) -> None:
        """Wait for all processes."""
        self.engine.wait_for_everyone()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Any:
        """A context with this process's part of ``inputs``; see ``Engine.split_between_processes``."""
        return self.engine.split_between_processes(inputs, apply_padding)

    def main_process_first(self) -> Any:
        """A context that the main process runs before the others begin it."""
        return self.engine.main_process_first()

    def local_main_process_first(self) -> Any:
        """A context that each machine's main process runs before its others begin it."""
        return self.engine.local_main_process_first()

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorate a function to run in the main process only."""
        return self.on_process(function, 0)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorate a function to run in each machine's main process only."""
        return self.on_local_process(function, 0)

    def on_last_process(self, function: Callable[..., Any]) -> Any:
        """Decorate a function to run in the last process only."""
        return self.on_process(function, self.num_processes - 1)

    def on_process(
        self,
        function: Callable[..., Any] | None = None,
        process_index: int | None = None,
    ) -> Any:
        """Decorate a function to run in one process only; where there is one process, in that."""
        if function is None:
            return lambda given: self.on_process(given, process_index)
        index = 0 if self.num_processes == 1 else process_index
        return self.engine.on_process(function, -1 if index is None else index)

    def on_local_process(
        self,
        function: Callable[..., Any] | None = None,
        local_process_index: int | None = None,
    ) -> Any:
        """Decorate a function to run in one process of each machine only."""
        if function is None:
            return lambda given: self.on_local_process(given, local_process_index)
        is_here = self.local_process_index == local_process_index
        index = self.process_index if is_here else -1
        return self.on_process(function, index)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, once on each machine."""
        self.engine.print(*args, **kwargs)

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the other processes. All processes call this."""
        if group is not None:
            torch.distributed.destroy_process_group(group)
            return
        for engine in _engines.values():
            engine.strategy.disconnect()
        _engines.clear()


def _not_there(kind: str, name: str) -> str:
    return (
        f"`{kind}` object has no attribute `{name}`. This happens if `{kind}._reset_state()` was called and "
        "an `Accelerator` or `PartialState` was not made again"
    )


class AcceleratorState:
    """What all Accelerators share: the processes, as a :class:`PartialState` tells them, and how they compute.

    Args:
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"`` (default: as ``accelerate launch`` says, else ``"no"``).
        cpu: compute on the CPU.
        dynamo_plugin: how models are compiled.
        deepspeed_plugin: how DeepSpeed trains them; a dict has several, by name.
        fsdp_plugin: how FSDP shards them.
        _from_accelerator: an Accelerator has made this.
        **kwargs: of :class:`PartialState`.

    Raises:
        ValueError: if there has been an instance with other values.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attributes = (
        *PartialState._known_attributes,
        "deepspeed_plugins",
        "dynamo_plugin",
        "fsdp_plugin",
        "_mixed_precision",
    )

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        if not PartialState._shared_state:
            PartialState(cpu, **kwargs)
        self.__dict__.update(PartialState._shared_state | self.__dict__)
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = str(mixed_precision or asked).lower()
        if mixed_precision is not None or cpu:
            self._check_initialized(precision if mixed_precision else None, cpu)
        if self.initialized:
            return
        self._mixed_precision = precision
        self.dynamo_plugin = dynamo_plugin or TorchDynamoPlugin()
        self.use_ipex = None
        self.torch_tp_plugin = self.parallelism_config = self.device_mesh = None
        self.deepspeed_plugins = deepspeed_plugin
        self.fsdp_plugin = fsdp_plugin
        if deepspeed_plugin is not None:
            self.distributed_type = DistributedType.DEEPSPEED
        elif fsdp_plugin is not None and self.num_processes > 1:
            self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = self.distributed_type

    @property
    def initialized(self) -> bool:
        """Whether an Accelerator or an instance of this has been made."""
        return "_mixed_precision" in self._shared_state

    def _check_initialized(self, mixed_precision: str | None, cpu: bool) -> None:
        """Raise if there has been an instance with other values.

        Raises:
            ValueError: naming the value.
        """
        if not self.initialized:
            return
        error = (
            "AcceleratorState has already been initialized and cannot be changed, restart your runtime completely and "
            "pass `{flag}` to `Accelerator()`."
        )
        if cpu and self.device.type != "cpu":
            raise ValueError(error.format(flag="cpu=True"))
        is_other = mixed_precision not in (None, self._mixed_precision)
        if is_other and self.distributed_type != DistributedType.DEEPSPEED:
            raise ValueError(error.format(flag=f"mixed_precision='{mixed_precision}'"))

    def __repr__(self) -> str:
        return f"{PartialState()!r}\nMixed precision type: {self.mixed_precision}\n"

    @property
    def mixed_precision(self) -> str:
        """In which numbers models compute; under DeepSpeed, what its configuration says."""
        plugin = self.deepspeed_plugin
        if plugin is None:
            return self._mixed_precision
        config = plugin.deepspeed_config
        for name in ("fp16", "bf16"):
            if config.get(name, {}).get("enabled", False) is True:
                return name
        return self._mixed_precision

    @property
    def deepspeed_plugin(self) -> Any:
        """The plugin in force, if there is one."""
        plugins = self.__dict__.get("deepspeed_plugins")
        if isinstance(plugins, dict):
            chosen = (plugin for plugin in plugins.values() if plugin.selected)
            return next(chosen, None)
        return plugins

    def get_deepspeed_plugin(self, name: str) -> Any:
        """The plugin of that name."""
        return self.deepspeed_plugins[name]

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Let the plugin of that name be in force."""
        for other, plugin in self.deepspeed_plugins.items():
            plugin.select(other == name)

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded by torch's ``fully_shard``, as they are here whenever they are sharded."""
        return self.distributed_type == DistributedType.FSDP

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Forget what all instances share, and with ``reset_partial_state`` also what a PartialState knows."""
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()

    def __getattr__(self, name: str) -> Any:
        if name in self._known_attributes:
            raise AttributeError(_not_there("AcceleratorState", name))
        # Everything else is asked of the processes.
        if not name.startswith("_") and hasattr(PartialState, name):
            return getattr(PartialState(), name)
        raise AttributeError(f"'AcceleratorState' object has no attribute '{name}'")


def is_initialized() -> bool:
    """Whether there is an :class:`AcceleratorState`."""
    return AcceleratorState._shared_state != {}


class GradientState:
    """Where accumulation stands.

    Args:
        gradient_accumulation_plugin: how gradients are accumulated from now on.

    Attributes:
        sync_gradients: whether optimizers step after the running batch.
        plugin_kwargs: what the plugin says beside its defaults.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None
    ) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self.sync_gradients = True
            self.plugin_kwargs: dict[str, Any] = {}
            self._loaders: list[weakref.ref[Any]] = []
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    @property
    def initialized(self) -> bool:
        """Whether there has been an instance."""
        return GradientState._shared_state != {}

    @property
    def num_steps(self) -> int:
        """Batches for each optimizer step."""
        return self.plugin_kwargs.get("num_steps", 1)

    @property
    def adjust_scheduler(self) -> bool:
        """Whether a scheduler counts steps inside a window."""
        return self.plugin_kwargs.get("adjust_scheduler", False)

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether a window ends with the loader."""
        return self.plugin_kwargs.get("sync_with_dataloader", True)

    @property
    def sync_each_batch(self) -> bool:
        """Whether gradients are averaged after each batch."""
        return self.plugin_kwargs.get("sync_each_batch", False)

    @property
    def dataloader_references(self) -> list[Any]:
        """The loaders that are being iterated, the innermost last, after a None."""
        return [None, *(reference() for reference in self._loaders)]

    @property
    def active_dataloader(self) -> Any:
        """The loader that is being iterated; None outside of any."""
        return self.dataloader_references[-1]

    @property
    def in_dataloader(self) -> bool:
        """Whether a loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the running batch is its loader's last."""
        loader = self.active_dataloader
        return loader is not None and loader.end_of_dataloader

    @property
    def remainder(self) -> int:
        """How many samples of the last round are no repetitions, 0 for all of them; -1 if that is not known."""
        loader = self.active_dataloader
        return -1 if loader is None else loader.remainder

    def enter(self, loader: Any) -> None:
        """Begin the iteration of a loader."""
        # This makes an instance complete again if the state was reset meanwhile.
        GradientState()
        self._loaders.append(weakref.ref(loader))

    def leave(self, loader: Any) -> None:
        """End the iteration of a loader."""
        GradientState()
        others = [known for known in self._loaders if known() not in (None, loader)]
        self._loaders[:] = others

    _add_dataloader = enter
    _remove_dataloader = leave

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        """Say whether optimizers step after the running batch."""
        self.sync_gradients = sync_gradients

    @staticmethod
    def _reset_state() -> None:
        """Forget what all instances share."""
        GradientState._shared_state.clear()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """A context with these variables in the environment, their names in capitals."""
    before = {name.upper(): os.environ.get(name.upper()) for name in kwargs}
    os.environ.update({name.upper(): str(value) for name, value in kwargs.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
