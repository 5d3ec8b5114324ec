"""What there is to tell of one training step: its samples, losses and gradients, and whether they are as recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...strategies.optimizer_state import parameters_of
from ..data.iteration import INFINITE
from .asked import Asked

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..trainer import Trainer

# How many parameters are named, and samples printed.
_MOST_PARAMETERS = 8
_MOST_SAMPLES = 64


class StepValues:
    """Gathers what a step shows, batch by batch.

    Args:
        trainer: whose step it is, before its first batch.
        request: which step.
        first: index of that batch.
    """

    def __init__(self, trainer: Trainer, request: Asked, first: int) -> None:
        self._trainer = trainer
        self._request = request
        self._first = first
        self._epoch = trainer.current_epoch
        self._losses: dict[int, Any] = {}
        # Squares of the gradients' norms before they are clipped.
        self._squares: list[float] = []

    def head(self) -> str:
        """Return which step this is, and which samples it has, in lines."""
        wanted = self._request
        trainer = self._trainer
        rank = (
            f", rank {wanted.rank} of {wanted.world_size}"
            if wanted.world_size > 1
            else ""
        )
        begin = (
            f"from {wanted.checkpoint}" if wanted.checkpoint else "from the beginning"
        )
        batches = self._batches()
        lines = [
            f"step {wanted.step}{rank}: epoch {self._epoch}, batch {_range(batches)} ({begin})"
        ]
        for batch_idx in batches:
            lines.append(
                f"samples           {told_samples(trainer.samples_of(batch_idx))}"
            )
        return "\n".join(lines)

    def _batches(self) -> range:
        """Return the indices of the step's batches, as far as they are known before it."""
        trainer = self._trainer
        count = trainer.accumulate_grad_batches
        left = trainer.num_training_batches - self._first
        if left < INFINITE:
            count = max(1, min(count, int(left)))
        return range(self._first, self._first + count)

    def begin_batch(self, batch_idx: int) -> None:
        """A batch of the step is about to be trained on."""
        self._losses[batch_idx] = None

    def end_batch(self, batch_idx: int, outputs: Any) -> None:
        """A batch of the step was trained on; ``outputs`` has the loss, if the step returned one."""
        if isinstance(outputs, Mapping):
            self._losses[batch_idx] = outputs.get("loss")

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Measure the gradients of an optimizer's parameters. A collective, where gradients are sharded."""
        for parameter in parameters_of(optimizer):
            if parameter.grad is not None:
                self._squares.append(_norm(parameter.grad) ** 2)

    def lines(self) -> list[str]:
        """Return what to tell of the step, which is done. A collective."""
        return [
            *self._told_losses(),
            *self._told_gradients(),
        ]

    def _told_losses(self) -> Iterator[str]:
        for batch_idx, loss in self._losses.items():
            name = "loss" if len(self._losses) == 1 else f"loss, batch {batch_idx}"
            value = (
                "not returned by training_step" if loss is None else repr(float(loss))
            )
            yield f"{name:<18}{value}"

    def _told_gradients(self) -> Iterator[str]:
        """Give the norm of all gradients, and the largest ones by parameter. A collective, if they are sharded."""
        module = self._trainer.module
        norms = {
            name: _norm(parameter.grad)
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        before = math.sqrt(sum(self._squares)) if self._squares else total
        if not norms:
            yield f"gradient norm     {before or 'the strategy keeps no gradients'}"
            return
        clipped = (
            ""
            if math.isclose(before, total, rel_tol=1e-6)
            else f"{total!r} after clipping, "
        )
        yield (
            f"gradient norm     {clipped}{before!r} before"
            if clipped
            else f"gradient norm     {total!r}"
        )
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if bad:
            more = (
                f" and {len(bad) - _MOST_PARAMETERS} more"
                if len(bad) > _MOST_PARAMETERS
                else ""
            )
            yield f"not finite        {', '.join(bad[:_MOST_PARAMETERS])}{more}"
        largest = sorted(norms, key=lambda name: -norms[name])[:_MOST_PARAMETERS]
        for name in largest:
            yield f"  {norms[name]:<16.6g}{name}"


def is_same(value: Any, other: Any) -> bool:
    """Whether two nested values hold the same numbers, bit for bit; what was not kept counts as the same."""
    if other is None:
        return True
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        other = other
        if value.dtype != other.dtype or value.shape != other.shape:
            return False
        return torch.equal(as_bytes(value), as_bytes(other))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(
            is_same(value[key], other[key]) for key in value
        )
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(is_same, value, other))
    if type(value) in (str, int, float, bool):
        return value == other or (value != value and other != other)
    # Of other objects, the box has a description only.
    return True


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's memory."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def told_samples(samples: list[Any] | None) -> str:
    """Return indices of samples as text."""
    if samples is None:
        return "unknown: the loader has no indices (a stream, or a list of batches)"
    shown = ", ".join(map(str, samples[:_MOST_SAMPLES]))
    return shown + (f", … ({len(samples)})" if len(samples) > _MOST_SAMPLES else "")


def _range(batches: range) -> str:
    first = batches[0]
    last = batches[-1]
    return str(first) if first == last else f"{first} to {last}"


def _norm(tensor: Any) -> float:
    """Return the 2-norm of a gradient; of a sharded one, that of the whole, which is a collective."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return float(torch.linalg.vector_norm(tensor.double()))
