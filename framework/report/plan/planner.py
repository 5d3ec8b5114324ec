"""Makes a plan: follows a step for each choice that changes it, and reckons what each strategy keeps of it."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ....strategies.deepspeed import ELEMENTWISE_OPTIMIZERS
from ....strategies.fsdp import UNSHARDED_OPTIMIZERS
from ....strategies.module_policy import matches, modules_to_wrap
from ....strategies.precision import Precision, create_precision
from ...loop.optimizers import parse_optimizers
from ...module import Module
from ...seed import isolated_rng
from .batches import example_batch, first_batch, size_of
from .device import memory_here, read_memory
from .loan import Fakes, kept, on_loan
from .plan import Estimate, Plan
from .simulate import FULL, SIMULATIONS, Ledger, Setup, shard_shape
from .trace import (
    OptimizerCost,
    Parameter,
    Trace,
    checkpointed,
    fake_batch,
    optimizer_cost,
    trace_step,
)

if TYPE_CHECKING:
    from ...datamodule import DataModule
    from ...trainer import Trainer

_HALF = ("16-mixed", "bf16-mixed", "16-true", "bf16-true")


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; None leaves a choice to the plan.

    Attributes:
        memory: bytes of each device, or a text.
        accelerator: the kind of device.
        devices: numbers of processes.
        strategies: names.
        precisions: names or policies.
        micro_batches: numbers of samples.
        activation_checkpointing: policies; False or None for none.
        margin: the part of the memory that stays free.
    """

    memory: str | int | float | None = None
    accelerator: str | None = None
    devices: int | Sequence[int] | None = None
    strategies: Sequence[str] | None = None
    precisions: Sequence[int | str | Precision] | None = None
    micro_batches: Sequence[int] | None = None
    activation_checkpointing: Any = None
    margin: float = 0.1


@dataclass(frozen=True)
class Choice:
    """A way to train.

    Attributes:
        strategy: its name.
        processes: how many.
        precision: the policy.
        micro_batch: samples that a process computes at a time.
        policy: which parts compute their activations again; None for none.
    """

    strategy: str
    processes: int
    precision: Precision
    micro_batch: int
    policy: Any

    @property
    def converts(self) -> bool:
        """Whether the strategy gives the forward pass parameters in another type than that of the updates."""
        if self.strategy.startswith("deepspeed"):
            return self.precision.compute is not None
        is_sharded = self.strategy == "fsdp" and self.processes > 1
        return is_sharded and self.precision.compute is not None


class Planner:
    """Follows steps of one module on one batch.

    Args:
        trainer: a copy that is in no run.
        module: the module.
        batch: a batch.
        request: what is asked for.
    """

    def __init__(self, trainer: Trainer, module: Module, batch: Any, request: Request):
        self._trainer = trainer
        self._module = module
        self._request = request
        self._device = trainer.engine.device
        self._kind = _kind(request.accelerator, self._device)
        self._notes: Counter[str] = Counter()
        self._found: dict[Any, tuple[list[Parameter], int]] = {}
        self._traces: dict[Any, Trace | None] = {}
        self._costs: dict[Any, tuple[OptimizerCost | None, tuple[str, ...]]] = {}
        self._batch = batch
        self._size = size_of(batch)

    # What is planned for.

    def plan(self) -> Plan:
        """Make the plan."""
        request = self._request
        processes = self._processes
        memory = None
        if request.memory is not None:
            memory = read_memory(request.memory)
        elif self._kind == self._device.type:
            memory = memory_here(self._device, max(processes))
        usable = None if memory is None else int(memory * (1 - request.margin))
        estimates = []
        for micro_batch in self._micro_batches():
            choices = self._choices(micro_batch)
            estimates += [self._estimate(choice, usable) for choice in choices]
            decides = request.micro_batches is None and usable is not None
            if decides and any(each.fits is not False for each in estimates):
                break
        parameters = list(self._module.parameters())
        numbers = [p.numel() for p in parameters]
        trained = [p.numel() for p in parameters if p.requires_grad]
        if self._kind != self._device.type:
            self._notes[
                f"Followed with the operations of the {self._device.type}: on {self._kind}, some take less, such as "
                "attention with dropout"
            ] += 1
        return Plan(
            type(self._module).__name__,
            sum(numbers),
            sum(trained),
            self._kind,
            memory,
            usable,
            tuple(estimates),
            tuple(self._notes),
        )

    @cached_property
    def _processes(self) -> list[int]:
        devices = self._request.devices
        if devices is None:
            engine = self._trainer.engine
            nodes = 1 if engine.environment is None else engine.environment.num_nodes
            return [len(engine.devices) * nodes]
        counts = [devices] if isinstance(devices, int) else list(devices)
        if not counts or any(type(n) is not int or n < 1 for n in counts):
            raise ValueError(
                f"devices must be numbers of processes from 1; got {devices!r}"
            )
        return counts

    def _micro_batches(self) -> Iterator[int]:
        """The sizes to try: those asked for; else the batch's own, and halves of it."""
        sizes = self._request.micro_batches
        if sizes is not None:
            if any(type(size) is not int or size < 1 for size in sizes):
                raise ValueError(
                    f"micro_batches must be numbers of samples from 1; got {sizes!r}"
                )
            yield from sizes
            return
        size = self._size
        limit = self._trainer.micro_batch
        if isinstance(limit, int):
            size = min(size, limit)
        while size:
            yield size
            size //= 2

    def _choices(self, micro_batch: int) -> list[Choice]:
        """All combinations, in the order of what they cost in speed."""
        strategies = list(self._request.strategies or SIMULATIONS)
        if unknown := set(strategies) - set(SIMULATIONS):
            raise ValueError(
                f"strategies must be among {', '.join(SIMULATIONS)}; got {', '.join(map(repr, sorted(unknown)))}"
            )
        found = []
        for policy in self._policies:
            for precision in self._precisions:
                for name in strategies:
                    for count in self._processes:
                        processes = 1 if name == "single" else count
                        is_needless = count == 1 and name != "single"
                        if is_needless and self._request.strategies is None:
                            continue
                        choice = Choice(name, processes, precision, micro_batch, policy)
                        if choice not in found:
                            found.append(choice)
        return found

    @cached_property
    def _precisions(self) -> list[Precision]:
        asked = self._request.precisions
        if asked is not None:
            return [create_precision(each) for each in asked]
        own = self._trainer.engine.precision
        if own.name != "32-true":
            return [own]
        return [own, create_precision("bf16-mixed")]

    @cached_property
    def _policies(self) -> list[Any]:
        """Which parts may compute their activations again: by default none, or the blocks."""
        asked = self._request.activation_checkpointing
        if asked is not None:
            is_list = isinstance(asked, (list, tuple))
            several = is_list and any(
                each in (None, False) or isinstance(each, (list, tuple))
                for each in asked
            )
            policies = asked if several else [asked]
            return [None if policy is False else policy for policy in policies]
        own = self._trainer.strategy.activation_checkpointing
        if own is not None:
            return [own]
        block = _block_class(self._module)
        return [None] if block is None else [None, (block,)]

    # One choice.

    def _estimate(self, choice: Choice, usable: int | None) -> Estimate:
        setup, refused = self._setup(choice)
        ledger = Ledger()
        SIMULATIONS[choice.strategy](setup, ledger)
        most = ledger.highest
        known = setup.trace is not None
        fits = None
        if refused is not None:
            fits = False
        elif usable is not None and (known or ledger.peak > usable):
            fits = ledger.peak <= usable
        return Estimate(
            strategy=choice.strategy,
            devices=choice.processes,
            precision=choice.precision.name,
            micro_batch=choice.micro_batch,
            activation_checkpointing=self._names(choice.policy),
            parameters=most["parameters"],
            gradients=most["gradients"],
            optimizer=most["optimizer"],
            activations=most["activations"] if known else None,
            communication=most["communication"],
            step=most["step"],
            peak=ledger.peak,
            moment=ledger.moment,
            fits=fits,
            refused=refused,
            arguments=_arguments(choice, self._names(choice.policy)),
            remarks=_remarks(choice, self._size, self._trainer.accumulate_grad_batches),
        )

    def _setup(self, choice: Choice) -> tuple[Setup, str | None]:
        """What is to be simulated, and why the strategy refuses it, if it does."""
        precision = choice.precision
        trace = self._trace(choice)
        cost, kinds = self._cost(choice)
        strategy = self._own_strategy(choice.strategy)
        is_zero = choice.strategy.startswith("deepspeed")
        compute_size = reduce_size = None
        if is_zero:
            compute_size = 2 if precision.name in _HALF else FULL
        elif choice.converts:
            compute_size = precision.compute.itemsize  # type: ignore[union-attr]
            reduce_size = FULL
        if precision.reduce is not None:
            reduce_size = precision.reduce.itemsize
        parameters, buffers = self._tensors(precision)
        policy = getattr(strategy, "auto_wrap_policy", None)
        units, root = _units(self._module, self._numbers, policy)
        config = getattr(strategy, "config", {})
        setup = Setup(
            parameters,
            buffers,
            trace,
            cost or _guess(kinds, parameters, choice),
            choice.processes,
            compute_size,
            reduce_size,
            self._accumulates(choice),
            units,
            root,
            on_cpu=self._kind == "cpu",
            zero=config.get("zero_optimization", {}),
            offload=self._kind != "cpu" and _offloads(strategy),
        )
        if cost is None:
            self._notes[
                f"The states of {' and '.join(kinds)} are reckoned by its name, as it does not step on tensors "
                "without memory"
            ] += 1
        return setup, _refusal(choice, kinds)

    @cached_property
    def _numbers(self) -> dict[nn.Module, int]:
        """A number of each of the module's modules."""
        return {part: number for number, part in enumerate(self._module.modules())}

    def _tensors(self, precision: Precision) -> tuple[list[Parameter], int]:
        """The parameters in a precision, and the bytes of the buffers."""
        key = (precision.parameters, precision.buffers)
        if key not in self._found:
            with self._lent(_dtype_of(precision, False), None):
                parameters = _parameters(self._module, self._numbers)
                buffers = sum(buffer.nbytes for buffer in self._module.buffers())
            self._found[key] = (parameters, buffers)
        return self._found[key]

    def _accumulates(self, choice: Choice) -> bool:
        return (
            self._trainer.accumulate_grad_batches > 1 or choice.micro_batch < self._size
        )

    def _own_strategy(self, name: str) -> Any:
        """The Trainer's strategy, if it is the one of that name: its options count."""
        own = self._trainer.strategy
        return own if own.name == name else None

    def _names(self, policy: Any) -> tuple[str, ...]:
        """The classes that a policy chooses."""
        if policy is None:
            return ()
        parts = [part for part in self._module.modules() if matches(policy, part)]
        return tuple(dict.fromkeys(type(part).__name__ for part in parts))

    def _trace(self, choice: Choice) -> Trace | None:
        precision = choice.precision
        key = (
            precision.name,
            choice.micro_batch,
            self._names(choice.policy),
            choice.converts,
        )
        if key not in self._traces:
            self._traces[key] = self._follow(choice)
        return self._traces[key]

    def _follow(self, choice: Choice) -> Trace | None:
        """Follow the step; None, with a note, where that is not possible."""
        if not self._module.automatic_optimization:
            self._notes[
                "The activations are unknown: in manual optimization, the module's own code steps the optimizers"
            ] += 1
            return None
        precision = choice.precision
        dtype_of = _dtype_of(precision, choice.converts)
        try:
            with self._lent(dtype_of, choice.policy) as parameters:
                fakes = Fakes(self._device)
                batch = fake_batch(
                    self._batch, fakes, self._size, choice.micro_batch, precision
                )
                for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
                    batch = getattr(self._module, hook)(batch, 0)
                context = precision.forward_context(self._device)
                trace = trace_step(
                    self._module, batch, self._numbers, parameters, context
                )
        except Exception as error:
            # Whatever the user's code raises there.
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self._notes[
                f"The activations are unknown, as the step could not be followed without values ({reason})"
            ] += 1
            return None
        for guess in trace.guesses:
            self._notes[
                f"The step {guess}: values were taken as 1 or True, and selections as everything"
            ] += 1
        return trace

    def _cost(self, choice: Choice) -> tuple[OptimizerCost | None, tuple[str, ...]]:
        """What the optimizers take, None if that cannot be found out; and the names of their classes."""
        layout = "whole"
        if choice.processes > 1 and choice.strategy == "fsdp":
            layout = "parts"
        if choice.strategy.startswith("deepspeed"):
            layout = "flat"
        key = (layout, choice.processes, choice.precision.parameters)
        if key not in self._costs:
            self._costs[key] = self._step_optimizers(choice, layout)
        return self._costs[key]

    def _step_optimizers(
        self, choice: Choice, layout: str
    ) -> tuple[OptimizerCost | None, tuple[str, ...]]:
        with self._lent(_dtype_of(choice.precision, False), None):
            optimizers, _ = parse_optimizers(self._module.configure_optimizers())
            kinds = tuple(type(optimizer).__name__ for optimizer in optimizers)

            def shard(parameters: list[Tensor]) -> list[Tensor]:
                return _shard(parameters, layout, choice.processes)

            foreach = self._kind != "cpu" and layout != "parts"
            try:
                return optimizer_cost(optimizers, shard, foreach), kinds
            except Exception:
                # Kernels of other libraries take no fake tensors, and raise what they like.
                return None, kinds

    @contextmanager
    def _lent(self, dtype_of: Any, policy: Any) -> Iterator[list[Tensor]]:
        """Have the module with parameters of another type, and with parts that compute again; gives its parameters."""
        module = self._module
        keep = dtype_of or (lambda part, tensor: None)
        with on_loan(module, Fakes(self._device), keep):
            parts = []
            if policy is not None:
                parts = [part for part in module.modules() if matches(policy, part)]
            with checkpointed(parts):
                yield list(module.parameters())


def make_plan(
    trainer: Trainer,
    module: Module,
    batch: Any,
    datamodule: DataModule | None,
    request: Request,
) -> Plan:
    """Plan the memory of a training; nothing of the module, the data or the random generators changes.

    Args:
        trainer: a copy that is in no run.
        module: the module.
        batch: a batch, or a loader.
        datamodule: whose training loader gives the batch instead.
        request: what is asked for.
    """
    _check_plain(module)
    if not 0 <= request.margin < 1:
        raise ValueError(
            f"margin must be a part of the memory, from 0 to below 1; got {request.margin!r}"
        )
    device = trainer.engine.device
    with isolated_rng(device), kept(module), ExitStack() as contexts:
        module.trainer = trainer
        source = copy.copy(datamodule)
        trainer.run = _stand_in(module, source, batch)
        given = _given(trainer, module, source, batch)
        # What follows allocates nothing.
        contexts.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        contexts.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        contexts.enter_context(torch.device(device))
        contexts.enter_context(
            on_loan(module, Fakes(device), lambda part, tensor: None)
        )
        with trainer.engine.precision.init_context():
            module.configure_model()
        return Planner(trainer, module, given, request).plan()


def _given(trainer: Trainer, module: Module, source: Any, batch: Any) -> Any:
    """Return the batch, from where a fit would take it."""
    sources = [part for part in (source, module) if part is not None]
    if source is not None:
        source.trainer = trainer
    for part in sources if batch is None else ():
        part.prepare_data()
    for part in sources:
        part.setup("fit")
    if batch is None:
        try:
            return first_batch(sources[0].train_dataloader())
        except NotImplementedError:
            raise ValueError(
                f"batch: pass a batch or a loader, as {type(sources[0]).__name__} has no train_dataloader"
            ) from None
    return example_batch(batch)


def _check_plain(module: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} has been divided among processes by an earlier fit: plan with a module that is new"
            )


def _stand_in(module: Module, datamodule: Any, batch: Any) -> Any:
    """What ``configure_optimizers`` may ask of the run: how long it is, and on what."""
    try:
        length = len(batch) if hasattr(batch, "dataset") else 1000
    except TypeError:
        length = 1000
    loaders = SimpleNamespace(
        load_train=lambda: None,
        num_batches={"train": length},
        max_batches={"train": length},
        loaders={"train": batch},
    )
    return SimpleNamespace(
        module=module,
        datamodule=datamodule,
        ckpt_path=None,
        live_step=None,
        fn="fit",
        loaders=loaders,
        window_is_open=False,
    )


def _kind(accelerator: str | None, device: torch.device) -> str:
    if accelerator in (None, "auto"):
        return device.type
    if accelerator not in ("cpu", "gpu", "cuda", "mps", "xpu"):
        raise ValueError(
            f'accelerator must be "cpu", "gpu", "cuda", "mps" or "xpu"; got {accelerator!r}'
        )
    return "cuda" if accelerator == "gpu" else accelerator


def _dtype_of(precision: Precision, converts: bool) -> Any:
    """How a precision converts parameters and buffers; with ``converts``, for the forward pass."""

    def dtype_of(part: nn.Module, tensor: Tensor) -> torch.dtype | None:
        if not tensor.is_floating_point():
            return None
        if not isinstance(tensor, nn.Parameter):
            return precision.buffers
        is_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if converts and not is_norm:
            return precision.compute
        return precision.parameters

    return dtype_of


def _parameters(module: nn.Module, numbers: dict[nn.Module, int]) -> list[Parameter]:
    """The parameters, each once, in the order of ``module.parameters()``."""
    found: dict[int, Parameter] = {}
    for prefix, part in module.named_modules():
        for name, tensor in part.named_parameters(
            recurse=False, remove_duplicate=False
        ):
            if id(tensor) not in found:
                found[id(tensor)] = Parameter(
                    f"{prefix}.{name}" if prefix else name,
                    tuple(tensor.shape),
                    tensor.element_size(),
                    tensor.requires_grad,
                    numbers[part],
                )
    return list(found.values())


def _units(
    module: nn.Module, numbers: dict[nn.Module, int], policy: Any
) -> tuple[dict[int, int], int]:
    """By the number of each module, that of the FSDP unit that gathers its parameters; and the root's number."""
    root = numbers[module]
    units = dict.fromkeys(numbers.values(), root)
    # Inner ones come first, and their modules are theirs.
    taken: set[int] = set()
    for unit in modules_to_wrap(module, policy):
        for part in unit.modules():
            if numbers[part] not in taken:
                taken.add(numbers[part])
                units[numbers[part]] = numbers[unit]
    return units, root


def _block_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of which there are most blocks with parameters, if there are several."""
    kinds = Counter(
        type(part)
        for part in modules_to_wrap(module, None)
        if next(part.children(), None) is not None
    )
    if not kinds:
        return None
    kind, count = kinds.most_common(1)[0]
    return kind if count > 1 else None


def _shard(parameters: list[Tensor], layout: str, processes: int) -> list[Tensor]:
    """Make what a process steps on, with gradients."""
    made: list[Tensor] = []
    if layout == "flat":
        numel = ceil(sum(p.numel() for p in parameters) / processes)
        made = [nn.Parameter(torch.empty(numel))] if numel else []
    else:
        for parameter in parameters:
            shape = tuple(parameter.shape)
            if layout == "parts":
                shape = shard_shape(shape, processes)
            made.append(nn.Parameter(parameter.new_empty(shape)))
    for tensor in made:
        tensor.grad = torch.empty_like(tensor)
    return made


def _guess(
    kinds: Sequence[str], parameters: Sequence[Parameter], choice: Choice
) -> OptimizerCost:
    """What optimizers of such names take, where they cannot be tried: two numbers for each that is trained, or one."""
    numbers = sum(p.numel for p in parameters if p.trained)
    size = 0.0
    for kind in kinds[:1]:
        name = kind.lower()
        states = (
            1
            if any(
                word in name for word in ("sgd", "lion", "muon", "adagrad", "rmsprop")
            )
            else 2
        )
        # Blocks of 256 numbers share a scale in full precision.
        itemsize = 1 + FULL / 256 if "8bit" in name else FULL
        size = numbers * states * itemsize
    shared = choice.processes if choice.strategy not in ("single", "ddp") else 1
    return OptimizerCost(ceil(size / shared), 0)


def _refusal(choice: Choice, kinds: Sequence[str]) -> str | None:
    """Why a strategy does not take such optimizers or such a precision."""
    if choice.strategy == "fsdp" and choice.processes > 1:
        wrong = [kind for kind in kinds if kind in UNSHARDED_OPTIMIZERS]
        return f"fsdp does not step {wrong[0]}" if wrong else None
    if not choice.strategy.startswith("deepspeed"):
        return None
    if choice.precision.name not in ("32-true", *_HALF):
        return f"DeepSpeed has no precision {choice.precision.name}"
    if len(kinds) != 1:
        return "DeepSpeed steps one optimizer"
    return (
        None
        if kinds[0] in ELEMENTWISE_OPTIMIZERS
        else f"DeepSpeed is not known to step {kinds[0]} on flat tensors"
    )


def _offloads(strategy: Any) -> bool:
    return bool(
        getattr(strategy, "cpu_offload", False)
        or getattr(strategy, "offload_optimizer", False)
    )


_CLASSES = {
    "single": "SingleDeviceStrategy",
    "ddp": "DDPStrategy",
    "fsdp": "FSDPStrategy",
}


def _arguments(choice: Choice, names: tuple[str, ...]) -> str:
    """The Trainer's arguments for a choice, as they are typed."""
    strategy = f'"{choice.strategy}"'
    if names:
        option = f"activation_checkpointing=[{', '.join(names)}]"
        strategy = f"{_CLASSES.get(choice.strategy, '')}({option})"
        if choice.strategy.startswith("deepspeed"):
            strategy = f"DeepSpeedStrategy(stage={choice.strategy[-1]}, {option})"
    return f'devices={choice.processes}, strategy={strategy}, precision="{choice.precision.name}"'


def _remarks(choice: Choice, size: int, accumulation: int) -> tuple[str, ...]:
    """How to have a smaller micro-batch, with the same number of samples for each step of the optimizer."""
    if choice.micro_batch == size:
        return ()
    if choice.strategy in ("single", "ddp") and choice.micro_batch < size:
        return (
            f"Trainer(micro_batch={choice.micro_batch}), with the loader's batch_size={size} as it is",
        )
    if choice.micro_batch < size:
        windows = ceil(size / choice.micro_batch) * accumulation
        return (
            f"batch_size={choice.micro_batch} of the loader, and Trainer(accumulate_grad_batches={windows})",
        )
    return (f"batch_size={choice.micro_batch} of the loader",)
