"""The Engine: devices, a strategy and a precision for a training loop of one's own. The Trainer is built on it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...strategies import Precision, Strategy, create_strategy
from ...strategies.launch.hang_timeout import HangTimeout
from ...strategies.launch.launcher import can_rerun, rerun_script
from ...strategies.optimizer_state import (
    is_numbered,
    named,
    names_in,
    parameters_of,
)
from ...strategies.precision import create_precision
from ..arguments import check_count, names_arguments
from ..checkpoint.saver import Save, Saver
from ..data.batches import cast_batch
from ..data.device_input import move_batch
from ..messages import configure, log, silence
from ..subclasses import (
    STRATEGIES_ELSEWHERE,
    check_initialized,
    check_loggers,
    check_names,
    public_methods,
)
from .accelerate_launch import (
    check_launched_strategy,
    launched_accelerator,
    launched_accumulation,
    launched_debug,
    launched_precision,
)
from .accumulation import GradientAccumulation, MicroBatch
from .call_check import DEBUG_TIMEOUT, of_group
from .collectives import Collectives
from .devices import find_devices
from .loaders import PreparedLoader, SkippedLoader
from .loop_watch import LoopWatch
from .loss_scaling import LossScaler
from .prepare import Prepared, has_methods, trains
from .prepared import unwrapped
from .step_errors import explain_step

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    from ...loggers.base import Logger
    from ...strategies.launch.environment import ClusterEnvironment

    T = TypeVar("T")
    Ts = TypeVarTuple("Ts")


class Engine(Collectives):
    """Runs a training loop of your own on the chosen devices, with the chosen strategy and precision.

    ::

        engine = Engine(devices=2, strategy="ddp", precision="bf16-mixed")
        model, optimizer, loader = engine.prepare(model, optimizer, loader)
        for inputs, targets in loader:
            loss = loss_function(model(inputs), targets)
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    With several devices, the line that makes the engine starts the script again in one process for each, as torchrun
    would. In a notebook, give a function that makes the engine to :func:`~loopwright.framework.launch`.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or ``"xpu"``.
        devices: a count, a list of indices, ``"auto"`` or -1.
        num_nodes: number of machines; ``"auto"``: as many as a launcher has started processes on, else 1.
        strategy: a name or a :class:`~loopwright.strategies.Strategy`.
        precision: a name or a :class:`~loopwright.strategies.Precision`. Default: what ``accelerate launch`` asks for,
            else ``"32-true"``.
        gradient_accumulation_steps: micro-batches per optimizer step inside :meth:`accumulate`.
        logger: a logger, or a list of them, for :meth:`log`.
        sync_batchnorm: let batch norms compute their statistics over all processes.
        debug: let the processes compare every collective call before they make it. If one process calls something
            else, or does not come, that is an error which names file and line on each rank, and not a hang. Default:
            whether the environment variable ``LOOPWRIGHT_DEBUG`` is 1. Rare calls, such as :meth:`wait_for_everyone`
            and :meth:`load_state`, are always compared.
        use_distributed_sampler: shard the batches of prepared loaders over the processes; False if each process makes
            a loader for its own part of the data. By default, the processes find out for each loader.
        hang_timeout: how long a process may stand still before it is reported with its stacks and ended, with a code
            that is not 0: seconds or a ``timedelta``, 0 for ever, or a mapping of these by phase. The Engine knows
            two: ``"train"``, while one of its loaders is read, and ``"setup"`` before and between. Default, with
            several processes: 30 minutes and for ever.
        launch: start the processes now, or join those that a launcher has started. The Trainer does so in ``fit``.

    Attributes:
        gradient_accumulation_steps: as given; a new value takes effect with the next window.
        sync_gradients: whether the running micro-batch is the last of its window, after which optimizers step.
        global_step: number of windows in which an optimizer has stepped.
        loggers: the loggers, as a list.
        prepared: what :meth:`prepare` has prepared.
        prepared_type: the class of that record.
        hang_timeout: as given, read.
        save_state_pre_hooks, load_state_pre_hooks: what :meth:`save_state` and :meth:`load_state` call first.
        saver: writes checkpoints.
        instances: all engines of this process.
        loop_watch: notices if their loops stand still.

    Raises:
        ValueError: for arguments that are unknown, or that this machine cannot serve; before anything is set up.
        RuntimeError: for several devices where there is no script to start again.
    """

    instances: ClassVar[WeakSet[Engine]] = WeakSet()
    loop_watch: ClassVar[LoopWatch] = LoopWatch(instances)
    prepared_type: ClassVar[type[Prepared]] = Prepared

    @names_arguments
    def __init__(
        self,
        accelerator: str = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int | str = "auto",
        strategy: str | Strategy = "auto",
        precision: int | str | Precision | None = None,
        gradient_accumulation_steps: int = 1,
        logger: Logger | list[Logger] | None = None,
        sync_batchnorm: bool = False,
        debug: bool | None = None,
        use_distributed_sampler: bool | None = None,
        hang_timeout: float | timedelta | Mapping[str, float | timedelta] | None = None,
        launch: bool = True,
    ) -> None:
        check_count("gradient_accumulation_steps", gradient_accumulation_steps, 1)
        # Without launch, this engine is a Trainer's, which has an argument of its own for that.
        if launch:
            gradient_accumulation_steps = launched_accumulation(
                "gradient_accumulation_steps", gradient_accumulation_steps
            )
        own_loop = {"setup": 0, "train": 1800}
        self.hang_timeout = HangTimeout.read(hang_timeout, own_loop if launch else {})
        check_launched_strategy(strategy)
        self._requested = launched_accelerator(accelerator), devices, num_nodes
        self.precision = create_precision(launched_precision(precision))
        self._devices = find_devices(*self._requested, strategy)
        self.strategy = self._create_strategy(strategy, sync_batchnorm)
        self._setup_environment()
        self.loggers = check_loggers(
            [] if logger is None else logger, "a Logger or a list of them"
        )
        self.use_distributed_sampler = use_distributed_sampler
        self.saver = Saver()
        # The checkpoint that save_state(wait=False) has begun, until somebody waits for it.
        self._save: Save | None = None
        self._warned_incomplete = False
        self.save_state_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self.load_state_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self.prepared = self.prepared_type(self)
        self.running_loader = None
        self.loss_scaler = self._create_loss_scaler()
        self.accumulation = GradientAccumulation(
            self.strategy, gradient_accumulation_steps, _Counter()
        )
        self._micro_batch = MicroBatch(self)
        # With one process and nothing to scale, what backward() calls for a window of one batch without a weight. Most
        # loops are such; without this short way, they would wait for checks that find nothing to do.
        self._plain_backward = None
        if self.num_processes == 1:
            self._plain_backward = self.plain_backward()
        self._debug = launched_debug() if debug is None else debug
        Engine.instances.add(self)
        if launch:
            configure()
            if self.must_launch:
                self._launch()
            self.connect()
            Engine.loop_watch.begin(self)

    def _create_strategy(
        self,
        strategy: str | Strategy,
        sync_batchnorm: bool,
    ) -> Strategy:
        processes = len(self._devices.local) * self._devices.num_nodes
        created = create_strategy(strategy, several=processes > 1)
        check_initialized(created)
        check_names(created, Strategy, public_methods(Strategy), STRATEGIES_ELSEWHERE)
        created.sync_batchnorm |= sync_batchnorm
        return created

    def _setup_environment(self) -> None:
        devices = self._devices
        self.strategy.setup_environment(
            devices.local,
            devices.num_nodes,
            devices.environment,
        )
        # Processes that are still to be started check it themselves: here, the check would take memory of a device.
        if not self.must_launch:
            self.precision.check(self.device)

    def _create_loss_scaler(self) -> LossScaler | None:
        if (
            not self.precision.loss_scaling
            or self.strategy.capabilities.owns_loss_scale
        ):
            return None
        scaler = torch.amp.GradScaler(self.device.type, **self.precision.scaling())
        return LossScaler(scaler, self.precision.name)

    @property
    def environment(self) -> ClusterEnvironment | None:
        """What a launcher has told this process; None without a launcher, and if the process runs by itself."""
        return self._devices.environment

    @property
    def devices(self) -> list[torch.device]:
        """The devices of this machine: one for each of its processes."""
        return self._devices.local

    @property
    def is_copy(self) -> bool:
        """Whether this process runs all by itself, as others beside it do, and leaves what is shown to rank 0."""
        return self._devices.is_copy

    def detect_environment(self) -> None:
        """Find this process's device, where the engine was made in another process and sent here."""
        self._devices = find_devices(*self._requested, self.strategy)
        self._setup_environment()

    @property
    def must_launch(self) -> bool:
        """Whether the processes of this engine are still to be started."""
        return self.environment is None and self.strategy.world_size > 1

    def _launch(self) -> None:
        processes = self.num_processes
        if not can_rerun():
            raise RuntimeError(
                f"Engine(devices={self._requested[1]!r}) needs {processes} processes, and there is no script here "
                "to run again in them: write a function that makes the engine and trains, and call "
                f"launch(function, num_processes={processes}) from loopwright.framework"
            )
        rerun_script(processes, self.strategy.group.max_restarts)

    def connect(self) -> None:
        """Join the other processes, if that is not done."""
        self.strategy.connect()
        if self.num_processes > 1 and torch.distributed.is_initialized():
            timeout = float(os.environ.get(DEBUG_TIMEOUT, 60)) if self._debug else None
            self._calls = of_group(timeout)
            if self._debug:
                self._every_call = self._calls
        if self.is_copy or not self.is_main_process:
            silence()

    @overload
    def prepare(self, item: T, /) -> T: ...
    @overload
    def prepare(self, *objects: Unpack[Ts]) -> tuple[Unpack[Ts]]: ...
    def prepare(self, *objects: Any) -> Any:
        """Make modules, optimizers, loaders and schedulers ready, in any order and number.

        - A module is moved to the device. A call of what is returned computes in the precision, and synchronises
          gradients in the backward pass; where gradients are disabled, it is a call of your module. In all else it is
          your module: it has its class, its attributes and its ``state_dict``.
        - An optimizer and a scheduler do nothing until the window of :meth:`accumulate` is complete. Give an optimizer
          together with its module, or later.
        - A loader's batches are sharded over the processes (of *W* processes, rank *r* gets batches *r*, *r + W*, …)
          and moved to the device; see :class:`~loopwright.framework.engine.loaders.PreparedLoader`.

        Returns:
            One object for each, in the order given, of the same types for type checkers. Anything else is returned as
            it is. With several processes, a line is logged if that seems to be a stream of batches, such as
            webdataset's loader.

        Raises:
            ValueError: if the strategy cannot train the module, or not with these optimizers.
        """
        prepared = self.prepared.add(objects)
        loaders = self.prepared.loaders
        batch_size = getattr(loaders[0].loader, "batch_size", None) if loaders else None
        self.strategy.check_steps(
            batch_size,
            self.gradient_accumulation_steps,
            None,
            None,
        )
        return prepared[0] if len(prepared) == 1 else prepared

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Hand over the optimizers of the module that the strategy was set up with; returns those to step."""
        optimizers = self.strategy.setup_optimizers(optimizers)
        for optimizer in optimizers:
            self.watch(optimizer)
        return optimizers

    def watch(self, optimizer: Optimizer) -> None:
        """Under loss scaling, learn of an optimizer's steps.

        Raises:
            ValueError: if its gradients cannot be scaled back.
        """
        if self.loss_scaler is not None:
            self.loss_scaler.watch(optimizer)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The module that was given to :meth:`prepare`."""
        return unwrapped(model)

    def dispatch_model(
        self,
        model: nn.Module,
        device_map: str | dict[str, Any] = "auto",
        **options: Any,
    ) -> nn.Module:
        """Spread a model that is too big for one device over devices, CPU and disk, for inference in one process.

        Accelerate does it (``pip install loopwright[big-models]``), by hooks on the model's parts.

        Args:
            model: the model, on the CPU.
            device_map: where each part goes, as ``accelerate.dispatch_model`` takes it (devices, ``"cpu"``,
                ``"disk"``); ``"auto"`` lets ``accelerate.infer_auto_device_map`` decide.
            **options: arguments of these two functions, such as ``max_memory`` and ``no_split_module_classes`` for the
                one that decides, ``offload_dir`` and ``main_device`` for the other.

        Returns:
            The model, to be called under ``torch.no_grad()``.

        Raises:
            ImportError: if accelerate is not installed.
            ValueError: with several processes.
        """
        from .big_models import dispatch_model

        if self.num_processes > 1:
            raise ValueError(
                f"dispatch_model uses all devices from one process, and this engine has {self.num_processes}: "
                'make Engine(devices=1, strategy="single")'
            )
        return dispatch_model(model, device_map, options)

    @property
    def forward(self) -> Callable[..., Any]:
        """Calls a step of the module by name, for training: the strategy's own method, without a frame between."""
        return self.strategy.forward

    @property
    def evaluate(self) -> Callable[..., Any]:
        """Calls a step of the module by name, for evaluation: the strategy's own method, without a frame between."""
        return self.strategy.evaluate

    def start_epoch(self) -> None:
        """Begin a training epoch; callbacks may have changed which parameters are trained."""
        self.strategy.start_epoch()

    def start_evaluation(self) -> None:
        """Begin to evaluate, on all ranks: make equal what training leaves different. A collective."""
        self.strategy.start_evaluation()

    def without_gradients(self, inference_mode: bool) -> AbstractContextManager[Any]:
        """A context for evaluation.

        Inference mode is left out under a strategy that gathers sharded parameters for each forward: what it gathers
        there would be inference tensors, which cannot be trained later.

        Args:
            inference_mode: use ``torch.inference_mode`` where the strategy allows it, and not only ``torch.no_grad``.
        """
        gathers = self.strategy.capabilities.needs_equal_forwards
        if inference_mode and not (gathers and self.num_processes > 1):
            return torch.inference_mode()
        return torch.no_grad()

    @property
    def step_was_skipped(self) -> bool:
        """Whether a gradient overflowed in the last :meth:`step`, so that nothing was updated."""
        if self.loss_scaler is not None:
            return self.loss_scaler.step_was_skipped
        return self.strategy.step_was_skipped

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Torch's loss scaler, if the precision asks for one."""
        return None if self.loss_scaler is None else self.loss_scaler.scaler

    @scaler.setter
    def scaler(self, scaler: torch.amp.GradScaler) -> None:
        if self.loss_scaler is not None:
            self.loss_scaler.replace(scaler)
            return
        self.loss_scaler = LossScaler(scaler, self.precision.name)
        self._plain_backward = None
        for prepared in self.prepared.optimizers:
            self.watch(prepared.optimizer)

    @property
    def moves_batches(self) -> bool:
        """Whether :meth:`to_device` does anything."""
        return self.device.type != "cpu" or self.precision.input_dtype is not None

    def to_device(self, batch: Any) -> Any:
        """Move a batch's tensors to the device, and convert them where the precision says so."""
        return self.convert(move_batch(batch, self.device))

    def convert(self, batch: Any) -> Any:
        """Convert the tensors of a batch on the device where the precision says so."""
        dtype = self.precision.input_dtype
        return batch if dtype is None else cast_batch(batch, dtype)

    def enter_loader(self, loader: PreparedLoader) -> None:
        """Begin the iteration of a prepared loader, in all processes.

        Where modules are in evaluation mode, what training leaves different between the processes, such as buffers,
        is made equal.
        """
        self.prepared.running_loaders.append(loader)
        self.running_loader = loader
        self.accumulation.read_from(loader)
        self._check("iterate a loader")
        for strategy in self.prepared.strategies:
            if strategy.module.training:
                strategy.start_epoch()
            else:
                strategy.start_evaluation()

    def leave_loader(self, loader: PreparedLoader) -> None:
        """End the iteration of a prepared loader."""
        running = self.prepared.running_loaders
        if loader in running:
            running.remove(loader)
        self.running_loader = running[-1] if running else None
        self.accumulation.read_from(self.running_loader)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """The loader without this process's first batches; a prepared loader does not load them.

        After :meth:`load_state` a prepared loader does not need this: it goes on where it was.

        Args:
            dataloader: any loader.
            num_batches: how many to leave out.
        """
        check_count("num_batches", num_batches, 0)
        return SkippedLoader(dataloader, num_batches)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[Any]:
        """Around a micro-batch: prepared optimizers step after ``gradient_accumulation_steps`` of them.

        Until then gradients stay local to the process, and ``step()`` and ``zero_grad()`` of prepared optimizers and
        ``step()`` of prepared schedulers do nothing. The last window of an epoch, if it is shorter, divides by what it
        holds.

        Args:
            *models: the prepared models that it trains (default: all).
        """
        if models != self._micro_batch.models:
            self._micro_batch = MicroBatch(self, models)
        return self._micro_batch

    def begin_micro_batch(self) -> None:
        """Begin a micro-batch; if the window is complete, the next one."""
        window = self.accumulation
        if window.is_last:
            # Windows of one batch, one after the other, need no bookkeeping.
            is_plain = self._plain_backward is not None and window.num_batches == 1
            if is_plain and window.length == 1 and window.weight is None:
                window.restart()
                return
            if window.has_stepped or window.completed:
                self.end_window()
            for optimizer in self.prepared.optimizers:
                optimizer.begin_window()
        window.begin_next()

    @property
    def accumulating(self) -> bool:
        """Whether :meth:`accumulate` is entered."""
        return self._micro_batch.is_entered

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step; set anew, it counts from the next window on."""
        return self.accumulation.num_batches

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        check_count("gradient_accumulation_steps", steps, 1)
        self.accumulation.over(steps)

    @property
    def sync_gradients(self) -> bool:
        """Whether the running micro-batch is the last of its window, after which optimizers step."""
        return self.accumulation.is_last

    @property
    def global_step(self) -> int:
        """Windows in which an optimizer has stepped."""
        return self.accumulation.counter.global_step

    @global_step.setter
    def global_step(self, steps: int) -> None:
        self.accumulation.counter.global_step = steps

    def backward(self, loss: Tensor, weight: Any = None, **kwargs: Any) -> None:
        """Compute the gradients of ``loss`` divided by its window's length, and scaled where the precision needs it.

        Args:
            loss: the mean over the batch.
            weight: what the batch counts beside the others of its window and of the other processes, such as its number
                of tokens: for all batches or for none.
            **kwargs: for ``Tensor.backward``.
        """
        window = self.accumulation
        try:
            plain = self._plain_backward
            has_weight = weight is not None or window.weight is not None
            if plain is not None and window.length == 1 and not has_weight:
                # Outside of accumulate, nobody else begins the next window.
                if window.has_stepped and not self.accumulating:
                    window.restart()
                plain(loss, **kwargs)
                return
            if not self.accumulating and (window.has_stepped or window.completed):
                self.end_window()
            if self._every_call is not None:
                self._every_call.check(
                    "backward" if window.is_last else "backward (local)"
                )
            self.compute_gradients(window.add(loss, weight), **kwargs)
        except Exception as error:
            explain_step(error, loss)
            raise

    def compute_gradients(
        self,
        loss: Tensor,
        *args: Any,
        run: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compute the gradients of ``loss``: scaled if the precision says so, and not divided for its window.

        Args:
            loss: a scalar.
            *args: for ``Tensor.backward``.
            run: called with the scaled loss instead of the strategy's backward.
            **kwargs: for ``Tensor.backward``.
        """
        if self.loss_scaler is not None:
            loss = self.loss_scaler.scale(loss)
        run = run or self.strategy.backward
        if self.strategy.inside_forward:
            self.strategy.prepare_backward(loss)
        if self.precision.compute is not None and torch.is_autocast_enabled(
            self.device.type
        ):
            # Manual optimization calls this inside the step, under autocast. The backward pass needs none: it computes
            # each operation in the type that its forward had.
            with torch.autocast(self.device.type, enabled=False):
                run(loss, *args, **kwargs)
        else:
            run(loss, *args, **kwargs)

    def plain_backward(self) -> Callable[[Tensor], Any] | None:
        """The function that is all that :meth:`compute_gradients` would call; None if it does more than that."""
        if self.loss_scaler is not None or self.precision.compute is not None:
            return None
        if type(self.strategy).backward is Strategy.backward:
            return Tensor.backward
        return self.strategy.backward

    def no_sync(
        self, *models: nn.Module, model: nn.Module | None = None
    ) -> AbstractContextManager[Any]:
        """A context around forward and backward in which gradients stay local to the process.

        Args:
            *models: prepared models (default: all).
            model: the same, for one.
        """
        if model is not None:
            models = (*models, model)
        strategies = self.prepared.strategies or [self.strategy]
        if len(strategies) == 1:
            return strategies[0].no_sync()
        chosen = [unwrapped(model) for model in models]
        stack = ExitStack()
        for strategy in strategies:
            if not models or any(strategy.module is module for module in chosen):
                stack.enter_context(strategy.no_sync())
        return stack

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[Any]:
        """A context that computes in the engine's precision, for what is done outside of a prepared model.

        Args:
            autocast_handler: an object that switches it off, if its ``enabled`` is false.
        """
        if autocast_handler is not None and not autocast_handler.enabled:
            return nullcontext()
        return self.precision.forward_context(self.device) or nullcontext()

    def keep_gradients_local(self, local: bool) -> None:
        """Before :meth:`setup_optimizers`: whether gradients are averaged by :meth:`sync_gradients_of` alone.

        Raises:
            ValueError: if the strategy cannot do that.
        """
        if self.strategy.capabilities.can_delay_sync:
            self.strategy.keeps_gradients_local = local
        elif local and self.num_processes > 1:
            raise ValueError(
                f'micro_batch with {self.num_processes} processes takes strategy="ddp"; {self.strategy.name!r} lets '
                "processes meet in the middle of a step, where one that ran out of memory would not come"
            )

    def sync_gradients_of(self, optimizer: Optimizer) -> None:
        """Average the gradients that :meth:`no_sync` kept local, when no other backward will. A collective."""
        self.strategy.sync_gradients(list(parameters_of(optimizer)))

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring an optimizer's gradients back to their true size, once per step."""
        if self.loss_scaler is not None:
            self.loss_scaler.unscale(optimizer)

    def complete_gradients(self, *optimizers: Optimizer) -> None:
        """Make the gradients of optimizers those of their steps, once: unscaled, and the mean over the window.

        Under loss scaling, those that are given together step together, or none of them if a gradient overflowed.

        Args:
            *optimizers: whose gradients.
        """
        window = self.accumulation
        missing = [each for each in optimizers if id(each) not in window.completed]
        for optimizer in missing:
            prepared = self.prepared.find_optimizer(optimizer)
            if prepared is not None and self.num_processes > 1:
                prepared.sync_missed_gradients()
            self.unscale(optimizer)
            window.completed.add(id(optimizer))
        if self.loss_scaler is not None and len(missing) > 1:
            self.loss_scaler.share_overflow(missing)
        if window.is_complete or not missing:
            return
        factor = window.factor()
        if factor is None:
            return
        for optimizer in missing:
            self.scale_gradients(optimizer, factor)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply the gradients with which an optimizer steps next.

        Args:
            optimizer: whose parameters' gradients, as it was prepared or as it was given.
            factor: a number or a 0-dim tensor.
        """
        self.prepared.strategy_of(optimizer).scale_gradients(optimizer, factor)

    def clip_gradients(
        self,
        optimizer: Any,
        value: float | None,
        algorithm: str = "norm",
    ) -> None:
        """Clip the gradients of an optimizer's parameters.

        Args:
            optimizer: whose parameters' gradients, as it was prepared or as it was given.
            value: the largest norm, or the largest absolute value; None or 0 clips nothing.
            algorithm: ``"norm"`` scales all gradients by one factor, ``"value"`` clips each by itself.

        Raises:
            ValueError: for another algorithm.
        """
        if not value:
            return
        if algorithm not in ("norm", "value"):
            raise ValueError(
                f'the clipping algorithm must be "norm" or "value"; got {algorithm!r}'
            )
        # It may be a wrapper: a prepared optimizer, or that of manual optimization.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.unscale(optimizer)
        self.clip_together(list(parameters_of(optimizer)), value, algorithm)

    def clip_together(
        self, parameters: list[Tensor], value: float, algorithm: str = "norm"
    ) -> None:
        """Clip gradients that are unscaled already, as :meth:`clip_gradients`; those of several optimizers by one norm.

        Args:
            parameters: whose gradients.
            value: the largest norm, or the largest absolute value.
            algorithm: ``"norm"`` or ``"value"``.
        """
        norm = self.strategy.clip_gradients(parameters, value, algorithm)
        self.accumulation.note_norm(norm)

    def clip_grad_norm_(
        self,
        parameters: Any,
        max_norm: float,
        norm_type: float = 2.0,
    ) -> Tensor | None:
        """Clip gradients by their global norm, and return it; None inside a window, where nothing is done.

        Args:
            parameters: a tensor or an iterable of them.
            max_norm: the largest norm to leave.
            norm_type: which norm; ``inf`` is the largest absolute value.
        """
        if not self.sync_gradients:
            return None
        parameters = self._complete_for(parameters)
        return self.strategy.clip_gradients(parameters, max_norm, "norm", norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip each gradient by itself; inside a window, nothing is done.

        Args:
            parameters: a parameter or several, whose gradients are clipped.
            clip_value: the largest absolute value that is left.
        """
        if self.sync_gradients:
            self.strategy.clip_gradients(
                self._complete_for(parameters),
                clip_value,
                "value",
            )

    def _complete_for(self, parameters: Any) -> list[Tensor]:
        """Complete the gradients of the optimizers that train any of these parameters; returns these as a list."""
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for prepared in self.prepared.optimizers:
            if trains(prepared.optimizer, listed):
                self.complete_gradients(prepared.optimizer)
        return listed

    def step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Step an optimizer; under loss scaling, not if a gradient overflowed.

        Args:
            optimizer: the optimizer, its gradients complete.
            closure: for ``Optimizer.step``.
        """
        if self.loss_scaler is not None:
            return self.loss_scaler.step(optimizer, closure)
        if closure is not None:
            return optimizer.step(closure)
        return self.strategy.step(optimizer)

    def plain_step(self, optimizer: Optimizer) -> Callable[[], Any] | None:
        """The function that is all that :meth:`step` would call for an optimizer; None if it does more than that."""
        if self.takes_closures:
            return optimizer.step
        if self.loss_scaler is not None:
            return None
        return partial(self.strategy.step, optimizer)

    @property
    def takes_closures(self) -> bool:
        """Whether an optimizer may call a closure in :meth:`step`: not if losses are scaled, or the strategy steps."""
        return self.loss_scaler is None and type(self.strategy).step is Strategy.step

    def step_prepared(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Complete the gradients of a prepared optimizer, and step it.

        Args:
            optimizer: the user's optimizer.
            closure: for ``Optimizer.step``.
        """
        window = self.accumulation
        is_plain = self._plain_backward is not None and window.length == 1
        if is_plain and window.weight is None and closure is None:
            result = self.strategy.step(optimizer)
        else:
            self.complete_gradients(optimizer)
            result = self.step(optimizer, closure)
            window.completed.discard(id(optimizer))
        # The window stays open for further optimizers; the next micro-batch ends it.
        if not window.has_stepped:
            window.count_step()
        return result

    def end_stepped_window(self) -> None:
        """End the window if an optimizer has stepped in it."""
        if self.accumulation.has_stepped:
            self.end_window()

    def end_window(self) -> None:
        """End a window, all optimizers of which have stepped: adapt the loss scale."""
        if self.loss_scaler is not None:
            self.loss_scaler.end_window()
        self.accumulation.close()

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """One of the loggers.

        Args:
            name: its name, or what its class's begins with, such as ``"tensorboard"``.
            unwrap: return its ``experiment``, the object of the library behind it.

        Raises:
            ValueError: if there is none of that name.
        """
        for logger in self.loggers:
            kind = type(logger).__name__.lower()
            if name == logger.name or kind.startswith(name.lower()):
                return logger.experiment if unwrap else logger
        names = [type(logger).__name__ for logger in self.loggers]
        raise ValueError(f"get_tracker: no logger {name!r}; there are {names}")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Write one row to the loggers, from the main process.

        Args:
            values: by name: numbers, tensors with one element, which are read, and whatever else the loggers take.
            step: of the row (default: the number of optimizer steps).
        """
        if not self.loggers or not self.is_main_process:
            return
        from ..metrics.values import as_floats

        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, Real)
            or (isinstance(value, Tensor) and value.numel() == 1)
        }
        row = {**values, **as_floats(numbers)}
        for logger in self.loggers:
            logger.log_metrics(row, step=self.global_step if step is None else step)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state, by names of parameters."""
        optimizer = unwrapped(optimizer)
        return self.prepared.strategy_of(optimizer).optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Load what :meth:`optimizer_state` returned, or what torch's ``state_dict`` did.

        Args:
            optimizer: prepared, or not.
            state: the state; torch's, which has no names, is that of the same parameters in the same order.

        Raises:
            ValueError: if it is the state of another kind of optimizer, which has other options.
        """
        optimizer = unwrapped(optimizer)
        # Before the state is loaded, as torch then adds to the defaults what groups of older states lack.
        options = set(getattr(optimizer, "defaults", ()))
        if is_numbered(state):
            state = named(state, names_in(self.optimizer_state(optimizer)) or [])
        self.prepared.strategy_of(optimizer).load_optimizer_state(optimizer, state)
        for group in optimizer.param_groups:
            if lacking := options - group.keys():
                raise ValueError(
                    f"the state is of another kind of optimizer: it has no {', '.join(sorted(lacking))}, which a "
                    f"{type(optimizer).__name__} needs"
                )

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Let :meth:`save_state` save further objects, and :meth:`load_state` load them.

        Args:
            *objects: anything with ``state_dict()`` and ``load_state_dict()``.

        Raises:
            ValueError: for an object without them.
        """
        for item in objects:
            if not has_methods(item, "state_dict", "load_state_dict"):
                raise ValueError(
                    f"register_for_checkpointing takes objects with state_dict and load_state_dict; got {item!r}"
                )
        self.prepared.registered.extend(objects)

    def register_save_state_pre_hook(
        self, hook: Callable[[list[Any], list[Any], str], Any]
    ) -> RemovableHandle:
        """Let :meth:`save_state` first call ``hook(models, weights, output_dir)``.

        Args:
            hook: may write files of its own to the directory, and take out of ``weights`` what is then not saved.

        Returns:
            A handle with ``remove()``.
        """
        return _hooked(self.save_state_pre_hooks, hook)

    def register_load_state_pre_hook(
        self, hook: Callable[[list[Any], str], Any]
    ) -> RemovableHandle:
        """Let :meth:`load_state` first call ``hook(models, input_dir)``.

        Args:
            hook: may take out of ``models`` what it loads itself.

        Returns:
            A handle with ``remove()``.
        """
        return _hooked(self.load_state_pre_hooks, hook)

    def save_state(self, output_dir: str | os.PathLike[str], wait: bool = True) -> str:
        """Write a checkpoint of everything that was prepared or registered, and of the random generators.

        It has the Trainer's format: ``Module.load_from_checkpoint`` reads its weights, under any strategy. All
        processes call this. If the main process alone does, and has all of the state, the checkpoint lacks the other
        processes' random states.

        Args:
            output_dir: the directory, local or any fsspec URL; a checkpoint that is there is replaced, and other
                files stay.
            wait: until it is complete; otherwise only until everything is copied to the host's memory. The next
                call, :meth:`wait_for_save` or :meth:`end_training` then waits for the rest, and raises its error.

        Returns:
            The path.

        Raises:
            OSError: if it cannot be written, or the save before could not.
            RuntimeError: if some processes call something else, where each has a part of the state.
        """
        from .checkpoint import can_save_alone, save_state

        path = os.fspath(output_dir)
        if not self.all_call("save_state", alone=can_save_alone(self)):
            self.warn_incomplete(
                "save_state",
                "the random states of the others",
                "those that load it take the main one's",
            )
            save_state(self, path, wait=True, alone=True).finish()
            return path
        self._finish_save()
        self._save = save_state(self, path, wait)
        if wait:
            self._finish_save()
        return path

    def warn_incomplete(self, call: str, lacks: str, instead: str) -> None:
        """Say, once, what a checkpoint lacks if the main process saves it alone.

        Args:
            call: what the main process has called.
            lacks: what is missing.
            instead: what those that load the checkpoint do about it.
        """
        if not self._warned_incomplete:
            self._warned_incomplete = True
            log.warning(
                "%s was called by the main process alone: %s are not in the checkpoint, and %s; to resume exactly, "
                "call it in all processes",
                call,
                lacks,
                instead,
            )

    def wait_for_save(self) -> None:
        """Wait until the checkpoint that ``save_state(..., wait=False)`` began is complete. All processes call this.

        Raises:
            OSError: if it could not be written.
        """
        if self._save is not None:
            self.all_call("wait_for_save")
            self._finish_save()

    def _finish_save(self) -> None:
        if self._save is not None:
            save = self._save
            self._save = None
            save.finish()

    def load_state(
        self,
        input_dir: str | os.PathLike[str],
        weights_only: bool | None = None,
    ) -> None:
        """Load what :meth:`save_state` wrote, or a Trainer's checkpoint; prepared loaders go on where they were.

        Args:
            input_dir: the directory, local or any fsspec URL.
            weights_only: False lets pickled objects be loaded, which can run code.

        Raises:
            CheckpointError: if it is damaged, or does not fit.
            OSError: if the save before could not be written.
        """
        from .checkpoint import load_state

        self.all_call("load_state")
        # The checkpoint to load may be the one that is still being written.
        self._finish_save()
        load_state(self, os.fspath(input_dir), weights_only)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's parameters and buffers by name, whole under any strategy. All processes call this.

        Args:
            model: a module, prepared or not.
            unwrap: looked at by Accelerate; names are those of the module itself in any case.
        """
        from .checkpoint import whole_state

        return whole_state(self, model)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
    ) -> str:
        """Write a model's weights to ``model.safetensors`` in a directory, from the main process.

        All processes call this, or the main one alone where it has all of the weights.

        Args:
            model: a module, prepared or not.
            save_directory: the directory, local or any fsspec URL.

        Returns:
            The file's path.
        """
        from .checkpoint import is_whole, save_model

        together = self.all_call(
            "save_model", alone=self.is_main_process and is_whole(self)
        )
        return save_model(self, model, os.fspath(save_directory), together)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared or registered, and free its memory.

        Returns:
            None for each argument: ``model, optimizer = engine.free_memory(model, optimizer)``.
        """
        from .out_of_memory import free_memory

        count = len(objects)
        del objects
        self.forget()
        free_memory(self.device)
        return [None] * count

    clear = free_memory

    def forget(self, interrupted: bool = False) -> None:
        """Forget everything that was prepared or registered; without collectives if an error has ``interrupted``."""
        self.prepared.release(interrupted)
        self.prepared = self.prepared_type(self, self.prepared.data_seed)
        self._micro_batch = MicroBatch(self)
        self.end_window()
        self.running_loader = None
        self.accumulation.read_from(None)
        self.accumulation.abandon()

    def end_training(self) -> None:
        """Close the loggers, forget what was prepared, and leave the process group. All processes call this.

        Raises:
            OSError: if the save before could not be written.
            RuntimeError: if a process can no longer come, as it calls something else or has ended.
        """
        for logger in self.loggers if self.is_main_process else ():
            logger.finalize("success")
        self._meet("end_training")
        Engine.loop_watch.end()
        self._finish_save()
        self.free_memory()
        self.strategy.disconnect()
        self._calls = self._every_call = None


def _hooked(hooks: OrderedDict[int, Any], hook: Any) -> RemovableHandle:
    """Add a hook; returns what takes it out again."""
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


class _Counter:
    """Counts the optimizer steps of an engine that has no Trainer."""

    def __init__(self) -> None:
        self.global_step = 0
