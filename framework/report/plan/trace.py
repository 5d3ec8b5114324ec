"""One step of a module on tensors without memory: what its activations take, and when its gradients come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ....strategies.precision import Precision
from ...data.batches import cast_batch, map_tensors
from ...loop.step import step_arguments
from ...module import Module
from .loan import Fakes
from .tracker import CannotTrace, Event, Tracker, noting_modules


@dataclass(frozen=True)
class Parameter:
    """A parameter, whatever names it has.

    Attributes:
        name: its first name.
        shape: of it.
        itemsize: bytes of a number, as the module has it.
        trained: whether it gets a gradient.
        owner: the number of the module that has it.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    owner: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Their bytes, as the module has them."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Trace:
    """What a forward and a backward pass took.

    Attributes:
        events: in their order.
        activations: the highest count of bytes beside parameters, buffers and their gradients; with the batch.
        guesses: what was assumed of values.
    """

    events: tuple[Event, ...]
    activations: int
    guesses: tuple[str, ...]


@contextmanager
def checkpointed(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules compute their activations again in the backward pass.

    Args:
        parts: on loan, so that their attributes are put back.
    """
    for part in parts:
        vars(part)["forward"] = partial(
            checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False
        )
    yield


def fake_batch(
    batch: Any, fakes: Fakes, size: int, micro_batch: int, precision: Precision
) -> Any:
    """Return a batch of another size, whose tensors take no memory.

    Args:
        batch: the real one, of ``size`` samples.
        fakes: makes the tensors.
        size: how many samples it has.
        micro_batch: how many the other one has.
        precision: floating-point numbers are converted as the Trainer converts them.
    """

    def resized(tensor: Tensor) -> Tensor:
        fake = fakes.of(tensor)
        if size == micro_batch or tensor.dim() == 0 or tensor.shape[0] != size:
            return fake
        return torch.empty(
            (micro_batch, *tensor.shape[1:]), dtype=tensor.dtype, device=fake.device
        )

    fake = map_tensors(batch, resized)
    if precision.input_dtype is not None:
        fake = cast_batch(fake, precision.input_dtype)
    return fake


def trace_step(
    module: Module,
    batch: Any,
    numbers: dict[nn.Module, int],
    parameters: Sequence[Tensor],
    context: Any,
) -> Trace:
    """Run a training step and its backward pass, and note what they take.

    Args:
        module: on loan.
        batch: of fake tensors.
        numbers: those of its modules.
        parameters: its fake parameters, in their order.
        context: the precision's context for forward passes, or None.

    Raises:
        CannotTrace: if the step has no loss, or no end.
    """
    tracker = Tracker()
    for tensor in (*parameters, *module.buffers()):
        tracker.leave_out(tensor)
    map_tensors(batch, lambda tensor: tracker.count(tensor) or tensor)
    state = {"backward": False}
    handles = []
    for number, parameter in enumerate(parameters):
        if parameter.requires_grad:
            hook = partial(_note_gradient, tracker, number)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        with (
            torch.enable_grad(),
            tracker,
            noting_modules(tracker, numbers, lambda: state["backward"]),
        ):
            loss = _loss(module, batch, context)
            tracker.note("loss")
            state["backward"] = True
            loss.backward()
            del loss
        tracker.note("end")
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    events = tuple(tracker.events)
    return Trace(
        events, max(event.peak for event in events), tuple(sorted(tracker.guesses))
    )


def _note_gradient(tracker: Tracker, number: int, parameter: Tensor) -> None:
    gradient = parameter.grad
    # What the strategy does with it comes after the peak that it was a part of.
    tracker.note("gradient", number)
    if gradient is not None and gradient.layout == torch.strided:
        tracker.leave_out(gradient)


def _loss(module: Module, batch: Any, context: Any) -> Tensor:
    """Run the forward pass as the loop runs it."""
    arguments = (batch, 0)[: step_arguments(module.training_step)]
    with context or nullcontext():
        output = module.training_step(*arguments)
    if isinstance(output, dict):
        output = output.get("loss")
    if not isinstance(output, Tensor):
        raise CannotTrace("training_step returned no loss")
    if not output.requires_grad:
        raise CannotTrace("the loss does not depend on any parameter that is trained")
    return output


@dataclass(frozen=True)
class OptimizerCost:
    """What optimizers take of a process's memory.

    Attributes:
        states: bytes of their states.
        step: bytes that a step takes beside, for as long as it runs.
    """

    states: int
    step: int


def optimizer_cost(
    optimizers: Sequence[Optimizer],
    shard: Callable[[list[Any]], list[Tensor]],
    foreach: bool,
) -> OptimizerCost:
    """Step optimizers twice on parts of their parameters, and count.

    Args:
        optimizers: made for fake parameters; they stay as they are.
        shard: makes a process's tensors, with gradients, of a group's parameters.
        foreach: take all tensors together where the optimizer leaves that to torch, as torch does on accelerators.

    Returns:
        The states of all, and what the dearest step takes: they step one after the other.
    """
    states = step = 0
    for optimizer in optimizers:
        copied = _copy(optimizer, shard, foreach)
        tracker = Tracker()
        for group in copied.param_groups:
            for parameter in group["params"]:
                tracker.leave_out(parameter)
                if parameter.grad is not None:
                    tracker.leave_out(parameter.grad)
        with tracker, torch.no_grad():
            copied.step()
            tracker.take_peak()
            held = tracker.live
            copied.step()
            peak = tracker.take_peak()
        states += held
        step = max(step, peak - held)
    return OptimizerCost(states, step)


def _copy(
    optimizer: Optimizer, shard: Callable[[list[Any]], list[Tensor]], foreach: bool
) -> Any:
    copied = object.__new__(type(optimizer))
    vars(copied).update(vars(optimizer))
    # A scheduler puts a function of its own there, which steps the optimizer that it knows.
    vars(copied).pop("step", None)
    groups = []
    for group in optimizer.param_groups:
        tensors = shard([p for p in group["params"] if p.requires_grad])
        group = {**group, "params": tensors}
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
        groups.append(group)
    vars(copied).update(state=defaultdict(dict), param_groups=groups)
    return copied
