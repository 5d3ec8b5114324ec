"""Accelerate's ``Accelerator``: an Engine with its arguments, its loaders and its schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ....strategies import DDPStrategy, Precision, Strategy
from ....strategies.precision import create_precision
from ...engine.accelerate_launch import reads_itself
from ...engine.engine import Engine
from ...engine.prepared import unwrapped
from ...messages import log
from . import operations
from .checkpoints import (
    folder_to_load,
    keep_within_limit,
    next_folder,
    write_model,
)
from .hooks import get_state_dict_offloaded_model, is_offloaded
from .loaders import DataLoaderShard, prepare_data_loader, skip_first_batches
from .memory import release_memory
from .optimizer import AcceleratedScheduler, AcceleratorsPrepared, Window, mark
from .options import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    Options,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from .other import extract_model_from_parallel, save
from .parallelism import ParallelismConfig
from .plugins import (
    DeepSpeedPlugin,
    DummyOptim,
    DummyScheduler,
    FullyShardedDataParallelPlugin,
    configured_optimizer,
    configured_scheduler,
    ddp_strategy,
    group_options,
)
from .state import (
    AcceleratorState,
    GradientState,
    PartialState,
    asks_for,
    devices_of_processes,
)
from .tracking import Trackers, filter_trackers

_PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
_HANDLERS: tuple[type[Options], ...] = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
# Whether split_batches was passed to the Accelerator itself, as older programs do.
_split_batches = object()


def _handlers_of(given: list[Any] | None) -> dict[type, Any]:
    """The handlers by their types.

    Raises:
        ValueError: for two of one type.
        TypeError: for something else, or a handler that is not served.
    """
    found: dict[type, Any] = {}
    for handler in given or ():
        kind = type(handler)
        if not isinstance(handler, _HANDLERS):
            known = ", ".join(one.__name__ for one in _HANDLERS)
            raise TypeError(f"kwargs_handlers takes {known}; got {handler!r}")
        if kind in found:
            raise ValueError(
                f"You can only pass one `{kind.__name__}` in `kwargs_handlers`."
            )
        found[kind] = handler
    return found


def _precision_of(name: str, handlers: dict[type, Any]) -> Precision:
    """The policy for a ``mixed_precision``.

    Raises:
        ValueError: for a name that is not known.
        NotImplementedError: for fp8.
    """
    if name == "fp8":
        raise NotImplementedError(
            'mixed_precision="fp8" is not served here: use "bf16", or a Precision of your own with loopwright\'s Engine'
        )
    if name not in _PRECISIONS:
        raise ValueError(
            f"Unknown mixed_precision mode: {name}. Choose between {list(_PRECISIONS)}"
        )
    precision = create_precision(_PRECISIONS[name])
    scaling = handlers.get(GradScalerKwargs)
    if scaling is not None and precision.loss_scaling:
        options = dict(vars(scaling))
        precision = replace(precision, loss_scaling=options.pop("enabled"), **options)
    autocast = handlers.get(AutocastKwargs)
    if autocast is not None and not autocast.enabled:
        precision = replace(precision, compute=None)
    return precision


def _fsdp_plugin_of(given: Any) -> FullyShardedDataParallelPlugin | None:
    if given is None and asks_for("ACCELERATE_USE_FSDP"):
        return FullyShardedDataParallelPlugin()
    if given is not None and not isinstance(given, FullyShardedDataParallelPlugin):
        raise TypeError(
            "`fsdp_plugin` must be a FullyShardedDataParallelPlugin object."
        )
    return given


def _deepspeed_plugin_of(given: Any) -> Any:
    if given is None and asks_for("ACCELERATE_USE_DEEPSPEED"):
        given = DeepSpeedPlugin()
    plugins = list(given.values()) if isinstance(given, dict) else [given]
    for plugin in plugins:
        if plugin is not None and not isinstance(plugin, DeepSpeedPlugin):
            raise TypeError(
                "`deepspeed_plugin` must be a DeepSpeedPlugin object, or a dict of such."
            )
    if given is not None:
        plugins[0].select()  # type: ignore[union-attr] # it was given
    return given


class Accelerator(Trackers, Engine):
    """Prepares models, optimizers, loaders and schedulers for a training loop, as Accelerate's class of that name.

    It is an :class:`~loopwright.framework.Engine`, and has all of its methods. It starts no processes: a launcher does.

    Args:
        device_placement: move models and batches to the device. Models are moved in any case.
        split_batches: see :class:`~.options.DataLoaderConfiguration`.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"`` (default: as ``accelerate launch`` says, else ``"no"``).
        gradient_accumulation_steps: batches for each optimizer step; what ``accelerate launch`` says goes first.
        cpu: compute on the CPU.
        dataloader_config: how loaders are prepared.
        deepspeed_plugin, deepspeed_plugins: let DeepSpeed train; of several, in a dict, the first is in force.
        fsdp_plugin: shard models.
        torch_tp_plugin, megatron_lm_plugin: not served.
        rng_types: the generators that are made equal in all processes when a loader is iterated (default:
            ``["generator"]``, that of the sampler).
        log_with: trackers.
        project_dir: the project's folder.
        project_config: where it keeps what.
        gradient_accumulation_plugin: how gradients are accumulated.
        step_scheduler_with_optimizer: schedulers step with the optimizer: not inside a window, and once for each
            process. Otherwise as often as they are told.
        kwargs_handlers: options of DDP, of the loss scale, of the process group, of autocast and of the profiler.
        dynamo_backend: compile prepared models with it.
        dynamo_plugin: how.
        parallelism_config: over how many processes models are sharded, and how many replicas of that there are.

    Attributes:
        state: what the processes are, shared by all Accelerators.
        gradient_state: where accumulation stands, shared by all Accelerators.
        dataloader_config, project_configuration: as given; they may be set.
        trackers: those that :meth:`init_trackers` has begun.

    Raises:
        ValueError: for arguments that do not go together, or differ from those of the first Accelerator.
        NotImplementedError: for what is not served.
    """

    prepared_type = AcceleratorsPrepared
    fp8_backend = None
    # Whether no_sync has been asked for since the last step.
    _keeps_local = False

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: Any = _split_batches,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: list[Any] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Options] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
    ) -> None:
        arguments = {
            name: value for name, value in locals().items() if value is not self
        }
        arguments.pop("__class__", None)
        self._arguments = arguments
        _refuse(torch_tp_plugin, megatron_lm_plugin)
        if parallelism_config is None and asks_for("ACCELERATE_USE_PARALLELISM_CONFIG"):
            parallelism_config = ParallelismConfig()
        self.parallelism_config: ParallelismConfig | None = parallelism_config
        self._take_project(project_config, project_dir)
        handlers = self._take_handlers(kwargs_handlers)
        deepspeed = _deepspeed_plugin_of(deepspeed_plugins or deepspeed_plugin)
        shards = parallelism_config is not None and parallelism_config.dp_shard_enabled
        if shards and fsdp_plugin is None:
            fsdp_plugin = FullyShardedDataParallelPlugin()
        fsdp = None if deepspeed is not None else _fsdp_plugin_of(fsdp_plugin)
        if dynamo_backend is not None and dynamo_plugin is not None:
            raise ValueError(
                "You cannot pass in both `dynamo_plugin` and `dynamo_backend`, please only pass in one."
            )
        self.state = AcceleratorState(
            mixed_precision=None if mixed_precision is None else str(mixed_precision),
            cpu=cpu,
            dynamo_plugin=dynamo_plugin or TorchDynamoPlugin(backend=dynamo_backend),
            deepspeed_plugin=deepspeed,
            fsdp_plugin=fsdp,
            _from_accelerator=True,
            **group_options_of_state(self.init_handler),
        )
        self._take_windows(gradient_accumulation_plugin, gradient_accumulation_steps)
        self._take_loading(dataloader_config, split_batches)
        self.device_placement = device_placement
        self.rng_types = ["generator"] if rng_types is None else rng_types
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.log_with = filter_trackers(log_with, self.logging_dir)
        self.trackers = []
        with reads_itself():
            super().__init__(
                accelerator="cpu" if self.state.device.type == "cpu" else "auto",
                devices=devices_of_processes(),
                strategy=self._strategy(),
                precision=_precision_of(self.state.mixed_precision, handlers),
                debug=asks_for("ACCELERATE_DEBUG_MODE"),
            )
        self.accumulation = Window(self.strategy, self.accumulation.counter)

    def _take_project(self, config: ProjectConfiguration | None, folder: Any) -> None:
        self.project_configuration = config or ProjectConfiguration(project_dir=folder)
        if folder is not None and self.project_dir is None:
            self.project_configuration.set_directories(folder)

    def _take_handlers(self, given: list[Any] | None) -> dict[type, Any]:
        handlers = _handlers_of(given)
        self.ddp_handler = handlers.get(DistributedDataParallelKwargs)
        self.scaler_handler = handlers.get(GradScalerKwargs)
        self.init_handler = handlers.get(InitProcessGroupKwargs)
        self.profile_handler = handlers.get(ProfileKwargs)
        self.autocast_handler = handlers.get(AutocastKwargs)
        return handlers

    def _take_windows(
        self, plugin: GradientAccumulationPlugin | None, steps: int
    ) -> None:
        asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
        if plugin is not None and steps != 1:
            raise ValueError(
                "You can only pass one of `gradient_accumulation_steps` and `gradient_accumulation_plugin`. Please "
                "only pass in the created `GradientAccumulationPlugin` object."
            )
        if plugin is None:
            number = int(asked) if asked.isdecimal() else steps
            deepspeed = self.state.deepspeed_plugin
            if deepspeed is not None and not isinstance(
                deepspeed.gradient_accumulation_steps, str
            ):
                number = int(deepspeed.gradient_accumulation_steps or number)
            plugin = GradientAccumulationPlugin(num_steps=number)
        self.gradient_state = GradientState(gradient_accumulation_plugin=plugin)

    def _take_loading(
        self, config: DataLoaderConfiguration | None, split_batches: Any
    ) -> None:
        self.dataloader_config = config or DataLoaderConfiguration()
        if split_batches is not _split_batches:
            self.dataloader_config.split_batches = split_batches

    def _strategy(self) -> Strategy:
        group = group_options(self.init_handler)
        if self.state.deepspeed_plugin is not None:
            return self.state.deepspeed_plugin.strategy(group)
        parallelism = self.parallelism_config
        if parallelism is not None:
            parallelism.check(self.num_processes)
            if parallelism.dp_replicate_enabled and parallelism.dp_shard_enabled:
                sizes = parallelism.dp_replicate_size, parallelism.dp_shard_size
                group["device_mesh"] = sizes
        if self.state.fsdp_plugin is not None:
            return self.state.fsdp_plugin.strategy(group)
        return ddp_strategy(self.ddp_handler, group)

    def __reduce__(self) -> Any:
        arguments = dict(self._arguments)
        if arguments["split_batches"] is _split_batches:
            del arguments["split_batches"]
        return _make, (arguments,), self.prepared.loaders

    def __setstate__(self, loaders: list[Any]) -> None:
        self.prepared.loaders.extend(loaders)

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def distributed_type(self) -> DistributedType:
        """How the processes work together."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """How many processes there are."""
        return self.state.num_processes

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.num_processes > 1

    @property
    def multi_device(self) -> bool:
        """Whether there are several processes with a replica of the model each."""
        return self.use_distributed and self.distributed_type.value.startswith("MULTI_")

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded."""
        return self.state.is_fsdp2

    @property
    def mixed_precision(self) -> str:
        """``"no"``, ``"fp16"`` or ``"bf16"``."""
        return self.state.mixed_precision

    @property
    def native_amp(self) -> bool:
        """Whether models compute in half precision."""
        return self.mixed_precision != "no"

    @property
    def deepspeed_plugin(self) -> Any:
        """The plugin in force, if DeepSpeed trains."""
        return self.state.deepspeed_plugin

    @property
    def project_dir(self) -> Any:
        """The project's folder."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> Any:
        """The folder of trackers."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next automatically named checkpoint."""
        return self.project_configuration.iteration

    @property
    def saves_here(self) -> bool:
        """Whether this process writes files: the main one, or with ``save_on_each_node`` that of its machine."""
        if self.project_configuration.save_on_each_node:
            return self.is_local_main_process
        return self.is_main_process

    @property
    def should_save_model(self) -> bool:
        """Whether this process has weights to write."""
        return True

    @property
    def split_batches(self) -> bool:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """See :class:`~.options.DataLoaderConfiguration`."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def sync_gradients(self) -> bool:
        """Whether optimizers step after the running batch."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether a gradient overflowed in the last step of an optimizer, so that nothing was updated."""
        return any(item.step_was_skipped for item in self.prepared.optimizers)

    @property
    def _models(self) -> list[Any]:
        return list(self.prepared.modules.values())

    @property
    def _optimizers(self) -> list[Any]:
        return self.prepared.optimizers

    @property
    def _schedulers(self) -> list[Any]:
        return self.prepared.schedulers

    @property
    def _dataloaders(self) -> list[Any]:
        return self.prepared.loaders

    @property
    def _custom_objects(self) -> list[Any]:
        return self.prepared.registered

    # Which process does what -----------------------------------------------------------------------------------------

    def on_main_process(self, function: Any = None) -> Any:
        """Decorate a function to run in the main process only."""
        return self.state.on_main_process(function)

    def on_local_main_process(self, function: Any = None) -> Any:
        """Decorate a function to run in each machine's main process only."""
        return self.state.on_local_main_process(function)

    def on_process(self, function: Any = None, process_index: Any = None) -> Any:
        """Decorate a function to run in one process only; where there is one process, in that."""
        return self.state.on_process(function, process_index)

    def on_local_process(
        self, function: Any = None, local_process_index: int | None = None
    ) -> Any:
        """Decorate a function to run in one process of each machine only."""
        return self.state.on_local_process(function, local_process_index)

    # Preparing -------------------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Make modules, optimizers, DataLoaders and schedulers ready, in any order and number.

        Args:
            *args: such objects; anything else is returned as it is.
            device_placement: for each of them, whether it is moved to the device. Models are moved in any case.

        Returns:
            One object for each, in the order given.

        Raises:
            ValueError: for a ``device_placement`` of another length.
        """
        # After `_reset_state`, this says so.
        kind = self.distributed_type
        if device_placement is None:
            device_placement = [self.device_placement] * len(args)
        elif len(device_placement) != len(args):
            raise ValueError(
                f"`device_placement` should be a list with {len(args)} elements (the number of objects passed)."
            )
        given = list(args)
        if kind == DistributedType.DEEPSPEED:
            given = self._without_dummies(given)
        results = [
            self.prepare_data_loader(item, places)
            if isinstance(item, DataLoader)
            else item
            for item, places in zip(given, device_placement, strict=True)
        ]
        results = self._prepare_trained(results)
        results = [
            self.prepare_scheduler(item) if isinstance(item, LRScheduler) else item
            for item in results
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def _prepare_trained(self, items: list[Any]) -> list[Any]:
        """Prepare modules and optimizers among these."""
        trained = [item for item in items if isinstance(item, (nn.Module, Optimizer))]
        for item in trained:
            if isinstance(item, nn.Module):
                self.verify_device_map(item)
                _refuse_quantized_offload(item)
                self._compile(item)
        if not trained:
            return items
        prepared: Any = super().prepare(*trained)
        answers = iter((prepared,) if len(trained) == 1 else prepared)
        results = []
        for item in items:
            if isinstance(item, (nn.Module, Optimizer)):
                item = next(answers)
                if isinstance(item, nn.Module):
                    mark(item)
            results.append(item)
        return results

    def _compile(self, module: nn.Module) -> None:
        plugin = self.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO or self.prepared.find_module(module):
            return
        options = plugin.to_dict()
        if options["mode"] == "default":
            del options["mode"]
        unwrapped(module).compile(**options)

    def _without_dummies(self, items: list[Any]) -> list[Any]:
        """Put what DeepSpeed's configuration describes in the places of what stands for it."""
        config = self.deepspeed_plugin.deepspeed_config
        made: dict[int, Any] = {}
        for item in items:
            if isinstance(item, DummyOptim):
                made[id(item)] = configured_optimizer(item, config)
        for item in items:
            if isinstance(item, DummyScheduler):
                optimizer = made.get(id(item.optimizer), unwrapped(item.optimizer))
                made[id(item)] = configured_scheduler(
                    item, optimizer, config, self.num_processes
                )
        return [made.get(id(item), item) for item in items]

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> Any:
        """Prepare a model; see :meth:`prepare`.

        Args:
            model: the model.
            device_placement: it is moved to the device in any case.
            evaluation_mode: it is not trained. What is called without gradients does not communicate in any case.
        """
        return self.prepare(model)

    def prepare_optimizer(
        self, optimizer: Optimizer, device_placement: bool | None = None
    ) -> Any:
        """Prepare an optimizer whose model is prepared; see :meth:`prepare`."""
        return self.prepare(optimizer)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepare a scheduler whose optimizer is prepared; see :meth:`prepare`."""
        if isinstance(scheduler, AcceleratedScheduler):
            if not any(scheduler is item for item in self.prepared.schedulers):
                self.prepared.schedulers.append(scheduler)
            return scheduler
        optimizer = self.prepared.find_optimizer(getattr(scheduler, "optimizer", None))
        prepared = AcceleratedScheduler(
            scheduler,
            self.prepared.optimizers if optimizer is None else optimizer,
            step_with_optimizer=self.step_scheduler_with_optimizer,
            split_batches=self.split_batches,
        )
        self.prepared.schedulers.append(prepared)
        return prepared

    def prepare_data_loader(
        self,
        data_loader: Any,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Prepare a DataLoader; see :meth:`prepare`.

        Args:
            data_loader: the loader.
            device_placement: move its batches to the device.
            slice_fn_for_dispatch: takes this process's part of a batch, with ``dispatch_batches``.
        """
        if isinstance(data_loader, DataLoaderShard):
            prepared = data_loader
        else:
            config = self.dataloader_config
            if device_placement is None:
                device_placement = self.device_placement
            prepared = prepare_data_loader(
                data_loader,
                self.device,
                num_processes=self.num_processes,
                process_index=self.process_index,
                split_batches=config.split_batches,
                put_on_device=device_placement,
                rng_types=list(self.rng_types),
                dispatch_batches=config.dispatch_batches,
                even_batches=config.even_batches,
                slice_fn_for_dispatch=slice_fn_for_dispatch,
                use_seedable_sampler=config.use_seedable_sampler,
                data_seed=config.data_seed,
                non_blocking=config.non_blocking,
                use_stateful_dataloader=config.use_stateful_dataloader,
            )
        if not any(prepared is item for item in self.prepared.loaders):
            prepared.belong_to(self)
            self.prepared.loaders.append(prepared)  # type: ignore[arg-type] # it has its interface
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """The loader without this process's first batches."""
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(
        self,
        model: nn.Module,
        keep_fp32_wrapper: bool = True,
        keep_torch_compile: bool = True,
    ) -> Any:
        """The module that was given to :meth:`prepare`.

        Args:
            model: prepared.
            keep_fp32_wrapper: accepted: a module here is never changed to compute in half precision.
            keep_torch_compile: False gives a module that is called as if it had not been compiled.
        """
        module = super().unwrap_model(model)
        return extract_model_from_parallel(
            module, keep_fp32_wrapper, keep_torch_compile
        )

    def verify_device_map(self, model: nn.Module) -> bool:
        """Whether a model is spread over devices.

        Raises:
            ValueError: if it is, and there are several processes.
        """
        spread = any(
            len(getattr(part, "hf_device_map", ())) > 1 for part in model.modules()
        )
        if spread and self.use_distributed:
            raise ValueError(
                "You can't train a model that has been loaded with `device_map='auto'` in any distributed mode. Please "
                "rerun your script specifying `--num_processes=1`."
            )
        return spread

    # Training --------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, weight: Any = None, **kwargs: Any) -> None:
        """Compute the gradients of ``loss`` divided by ``gradient_accumulation_steps``.

        Args:
            loss: the mean over the batch.
            weight: see ``Engine.backward``.
            **kwargs: for ``Tensor.backward``.
        """
        if kwargs.pop("learning_rate", None) is not None:
            self.lomo_backward(loss, 0.0)
        super().backward(loss, weight, **kwargs)

    def lomo_backward(self, loss: Tensor, learning_rate: float) -> None:
        """Refuse optimizers that step inside the backward pass.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "optimizers that step inside the backward pass (LOMO) are not served here: use another optimizer, and "
            "strategy='fsdp' or DeepSpeed where memory is short"
        )

    def no_sync(self, *models: nn.Module, model: nn.Module | None = None) -> Any:
        """A context around forward and backward in which gradients stay local to the process."""
        if self.accumulating and self.gradient_state.sync_each_batch:
            return nullcontext()
        self.keep_local()
        return super().no_sync(*models, model=model)

    def keep_local(self) -> None:
        """Let the next optimizer step take gradients as they are in this process."""
        self._keeps_local = True

    def takes_local(self) -> bool:
        """Whether the step that is taken now asks for gradients as they are; the one after it does not."""
        keeps = self._keeps_local
        self._keeps_local = False
        return keeps

    @contextmanager
    def trigger_sync_in_backward(self, model: nn.Module) -> Iterator[None]:
        """A context around the last backward of several whose forwards ran in :meth:`no_sync`."""
        yield
        module = unwrapped(model)
        for strategy in self.prepared.strategies:
            if strategy.module is module:
                strategy.sync_gradients(list(module.parameters()))

    @contextmanager
    def join_uneven_inputs(
        self, joinables: list[Any], even_batches: bool | None = None
    ) -> Iterator[None]:
        """A context in which processes may have different numbers of batches.

        Args:
            joinables: the prepared models that are trained.
            even_batches: of prepared loaders, inside the context.
        """
        if self.distributed_type == DistributedType.NO:
            yield
            return
        if not self.multi_device:
            warn(
                "Joining uneven inputs is only supported for multi-GPU training, as a result `join_uneven_inputs` will "
                "have no effect.",
                stacklevel=3,
            )
            yield
            return
        modules = [unwrapped(model) for model in joinables]
        joined = [
            strategy.joinable
            for strategy in self.prepared.strategies
            if isinstance(strategy, DDPStrategy)
            and any(strategy.module is module for module in modules)
        ]
        with (
            self._loaders_with(even_batches),
            Join([item for item in joined if item is not None]),
        ):
            yield

    @contextmanager
    def _loaders_with(self, even_batches: bool | None) -> Iterator[None]:
        changed: list[tuple[Any, bool]] = []
        is_without = False
        for loader in self.prepared.loaders if even_batches is not None else ():
            sampler: Any = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "even_batches"):
                changed.append((sampler, sampler.even_batches))
                sampler.even_batches = even_batches
            else:
                is_without = True
        if is_without:
            warn(
                "Overriding even_batches is only supported for map-style datasets, yet some dataloaders given were "
                "iterable",
                stacklevel=5,
            )
        try:
            yield
        finally:
            for sampler, before in changed:
                sampler.even_batches = before

    def autocast(
        self, autocast_handler: AutocastKwargs | None = None
    ) -> AbstractContextManager[Any]:
        """A context that computes in the Accelerator's precision, for what is done outside of a prepared model.

        Args:
            autocast_handler: how (default: the one among ``kwargs_handlers``).
        """
        handler = autocast_handler or self.autocast_handler or AutocastKwargs()
        dtype = create_precision(_PRECISIONS[self.mixed_precision]).compute
        if dtype is None:
            return nullcontext()
        return torch.autocast(
            self.device.type,
            dtype=dtype,
            enabled=handler.enabled,
            cache_enabled=handler.cache_enabled,
        )

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Bring gradients back to their true size, before they are looked at or changed.

        Args:
            optimizer: one, or a list (default: all).
        """
        if optimizer is None:
            optimizer = self.prepared.optimizers
        for item in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
            self.complete_gradients(unwrapped(item))

    def clip_grad_norm_(
        self, parameters: Any, max_norm: float, norm_type: float = 2.0
    ) -> Any:
        """Clip gradients by their global norm, and return it.

        Args:
            parameters: a tensor or an iterable of them.
            max_norm: the largest norm to leave.
            norm_type: which norm; ``inf`` is the largest absolute value.
        """
        self._unscale_at_the_end()
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return self.strategy.clip_gradients(listed, max_norm, "norm", norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip each gradient by itself.

        Args:
            parameters: a tensor or an iterable of them.
            clip_value: the largest absolute value that is left.
        """
        self._unscale_at_the_end()
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self.strategy.clip_gradients(listed, clip_value, "value")

    def _unscale_at_the_end(self) -> None:
        # Inside a window, gradients that come later are scaled, too, and are added to those that are there.
        if self.sync_gradients:
            self.unscale_gradients()

    # Values of all processes -----------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Gather tensors in containers from all processes, concatenated along the first dimension."""
        return operations.gather(tensor)

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False
    ) -> Any:
        """Gather a step's results, without the samples that fill up the last round.

        Args:
            input_data: tensors in containers; anything else is gathered by pickling, as lists of samples.
            use_gather_object: gather by pickling, whatever it is.
        """
        pickles = use_gather_object or not operations.holds_only_tensors(input_data)
        if pickles:
            data = operations.gather_object(input_data)
        else:
            data = operations.gather_uneven(input_data)
        state = self.gradient_state
        if not state.end_of_dataloader:
            return data
        remainder = state.remainder
        if remainder == -1:
            log.info(
                "The used dataset had no length, returning gathered tensors. You should drop the remainder yourself."
            )
        if remainder <= 0:
            return data
        if pickles:
            return data[:remainder]
        return operations.recursively_apply(lambda own: own[:remainder], data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce tensors in containers over all processes; see :func:`~.operations.reduce`."""
        return operations.reduce(tensor, reduction, scale)

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: Any = 0, pad_first: bool = False
    ) -> Any:
        """Pad tensors in containers; see :func:`~.operations.pad_across_processes`."""
        return operations.pad_across_processes(tensor, dim, pad_index, pad_first)

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write an object to a file, in the main process only.

        Args:
            obj: anything, or tensors by name.
            f: the file.
            safe_serialization: as safetensors.
        """
        save(obj, f, self.project_configuration.save_on_each_node, safe_serialization)

    def save_model(  # type: ignore[override] # Accelerate returns nothing
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights to ``model.safetensors``, or to several files and an index; all processes call this.

        Args:
            model: a module, prepared or not.
            save_directory: the directory.
            max_shard_size: the largest size of one file.
            safe_serialization: False writes ``pytorch_model.bin`` by torch.save.
        """
        directory = os.fspath(save_directory)
        write_model(self, model, directory, max_shard_size, safe_serialization)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's weights by name, also those that are on the CPU or on disk between its calls; see ``Engine``."""
        module = unwrapped(model)
        if is_offloaded(module):
            return get_state_dict_offloaded_model(module)
        return super().get_state_dict(model, unwrap)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Let :meth:`save_state` save further objects, and :meth:`load_state` load them.

        Raises:
            ValueError: for objects without ``state_dict`` and ``load_state_dict``.
        """
        invalid = [
            f"\n\t- Item at index {index}, `{item!r}`"
            for index, item in enumerate(objects)
            if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict"))
        ]
        if invalid:
            raise ValueError(
                "All `objects` must include a `state_dict` and `load_state_dict` function to be stored. The following "
                "inputs are invalid:" + "".join(invalid)
            )
        super().register_for_checkpointing(*objects)

    def save_state(  # type: ignore[override] # it has Accelerate's arguments
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        **save_model_func_kwargs: Any,
    ) -> str:
        """Write a checkpoint of everything that was prepared or registered, and of the random generators.

        Args:
            output_dir: the directory; with ``automatic_checkpoint_naming``, it is named by itself.
            safe_serialization: accepted: a checkpoint is tensors and JSON.
            **save_model_func_kwargs: none; other ways to write are not served.

        Returns:
            The path.

        Raises:
            ValueError: without a directory, or if an automatically named one is there.
        """
        project = self.project_configuration
        names_itself = project.automatic_checkpoint_naming
        _refuse_arguments("save_state", save_model_func_kwargs)
        if names_itself:
            output_dir = next_folder(project)
            self.wait_for_everyone()
        elif output_dir is None:
            raise ValueError(
                "save_state needs an output_dir, or ProjectConfiguration(automatic_checkpoint_naming=True)"
            )
        path = super().save_state(os.path.expanduser(os.fspath(output_dir)))
        project.count_checkpoint()
        if names_itself and self.saves_here:
            keep_within_limit(project)
        return path

    def load_state(  # type: ignore[override] # it has Accelerate's arguments
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Load what :meth:`save_state` wrote. Loaders begin anew: see :meth:`skip_first_batches`.

        Args:
            input_dir: the directory (default: the newest that was automatically named).
            load_kwargs: ``{"weights_only": False}`` lets pickled objects be loaded, which can run code.
            **load_model_func_kwargs: none; other ways to load are not served.

        Raises:
            ValueError: if there is no such directory.
        """
        load_model_func_kwargs.pop("strict", None)
        weights_only = load_model_func_kwargs.pop("weights_only", None)
        weights_only = (load_kwargs or {}).get("weights_only", weights_only)
        _refuse_arguments("load_state", load_model_func_kwargs)
        paths = self.gather_object(os.fspath(input_dir) if input_dir else None)
        if self.is_main_process and any(path != paths[0] for path in paths):
            log.warning(
                "load_state was given other folders in other processes: all load the main process's, %s",
                paths[0],
            )
        path = folder_to_load(self.project_configuration, paths[0])
        super().load_state(path, weights_only)

    def free_memory(self, *objects: Any) -> list[Any]:
        """Forget everything that was prepared or registered, and free its memory.

        Returns:
            None for each argument.
        """
        super().free_memory()
        return release_memory(*objects)

    clear = free_memory

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[Any]:
        """A context that profiles; with ``output_trace_dir``, each process writes its trace there.

        Args:
            profile_handler: what and how (default: the one among ``kwargs_handlers``).
        """
        handler = profile_handler or self.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is None:
            return
        os.makedirs(handler.output_trace_dir, exist_ok=True)
        name = f"profile_{self.process_index}.json"
        profiler.export_chrome_trace(os.path.join(handler.output_trace_dir, name))
        self.wait_for_everyone()

    def end_training(self) -> None:
        """Close the trackers, forget what was prepared, and leave the other processes. All processes call this."""
        self.finish_trackers()
        super().end_training()
        PartialState().destroy_process_group()


def _make(arguments: dict[str, Any]) -> Accelerator:
    return Accelerator(**arguments)


def group_options_of_state(handler: InitProcessGroupKwargs | None) -> dict[str, Any]:
    """The arguments of a state that say how the processes meet."""
    options = group_options(handler)
    if "process_group_backend" in options:
        options["backend"] = options.pop("process_group_backend")
    return options


def _refuse(tensor_parallel: Any, megatron: Any) -> None:
    """Raise for ways to spread a model that are not served.

    Raises:
        NotImplementedError: naming the first.
    """
    for name, value in (
        ("torch_tp_plugin", tensor_parallel),
        ("megatron_lm_plugin", megatron),
    ):
        if value is not None:
            raise NotImplementedError(
                f"{name} is not served here: loopwright's FSDPStrategy has device_mesh= and tensor_parallel_size="
            )
    if asks_for("ACCELERATE_USE_MEGATRON_LM"):
        raise NotImplementedError(
            "accelerate launch asks for Megatron-LM, which is not served here: use FSDP"
        )


def _refuse_quantized_offload(model: Any) -> None:
    """Raise for a model of quantized weights of which some are on the CPU or on disk.

    Raises:
        ValueError: naming them.
    """
    is_quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(
        model, "is_loaded_in_4bit", False
    )
    places = (getattr(model, "hf_device_map", None) or {}).items()
    outside = [name or "all" for name, place in places if place in ("cpu", "disk")]
    if is_quantized and outside:
        raise ValueError(
            "You can't train a model that has been loaded in 8-bit or 4-bit precision with CPU or disk offload; of "
            f"this one, {', '.join(outside)} is there"
        )


def _refuse_arguments(call: str, arguments: dict[str, Any]) -> None:
    if arguments:
        raise TypeError(
            f"{call} has no argument {next(iter(arguments))!r} here: checkpoints have one format"
        )
