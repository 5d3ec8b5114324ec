"""Batches in parts: as many samples at once as memory holds, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import batch_size_of, slice_batch
from ..engine.out_of_memory import free_memory, is_out_of_memory
from ..messages import log
from ..metrics.metric_state import load_metric_states, metric_states
from ..seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from .step import Optimization


_Add = Callable[[Any, int, float, bool], Any]


class MicroBatches:
    """Runs training steps on parts of each batch.

    With ``"auto"``, the first part is the whole batch. When memory runs out, in whatever process and wherever in the
    step's forward or backward, all processes undo what the batch has done to gradients, buffers, metrics and random
    generators, halve the size, and begin the batch again.

    Gradients stay local to the process until the batch is done everywhere: a process that waits for another's in the
    middle of a backward could not be told. So with several processes each batch takes a collective of one number, and
    the gradients are averaged at the window's end, after the backward.

    Args:
        optimization: whose steps these are.
        size: samples at once, or ``"auto"``.
    """

    def __init__(self, optimization: Optimization, size: int | str) -> None:
        self.optimization = optimization
        self.engine, self.trainer = optimization.engine, optimization.trainer
        self.auto = size == "auto"
        if not self.auto:
            self.trainer.state.micro_batch = int(size)

    def gather(self, batch: Any, batch_idx: int, add: _Add) -> Any:
        """Add a batch's gradients to the window's, part by part.

        Args:
            batch: the batch.
            batch_idx: its index.
            add: runs the step on a part and adds its gradients, given the part, the index, the part's fraction, and
                whether it is the first.
        """
        try:
            whole = batch_size_of(batch)
        except ValueError as error:
            raise ValueError(
                f"micro_batch: a batch is divided along its first dimension, and {error}"
            ) from None
        state = self.trainer.state
        while True:
            size = min(state.micro_batch or whole, whole)
            undo = _Before(self.optimization) if self.auto else None
            failed, outputs = None, None
            try:
                outputs = self._run(batch, batch_idx, whole, size, add)
            except (RuntimeError, MemoryError) as error:
                if undo is None or not is_out_of_memory(error):
                    raise
                failed = str(
                    error
                )  # the error itself holds the step's frames, and so its memory
            if undo is None or not self._any(failed is not None):
                if undo is not None:
                    undo.keep()
                return outputs
            del outputs
            undo.restore()
            free_memory(self.engine.device)
            size = self._agreed(size)
            if size == 1:
                raise torch.OutOfMemoryError(
                    f'micro_batch="auto": memory does not suffice for a single sample (batch {batch_idx}): '
                    f"{failed or 'in another process'}"
                )
            state.micro_batch = -(-size // 2)
            log.info(
                "Out of memory with %d samples at once: going on with %d",
                size,
                state.micro_batch,
            )

    def _run(self, batch: Any, batch_idx: int, whole: int, size: int, add: _Add) -> Any:
        metrics = self.trainer.metrics
        outputs, fractions = [], []
        try:
            for start in range(0, whole, size):
                stop = min(start + size, whole)
                part = (
                    batch if size >= whole else slice_batch(batch, start, stop, whole)
                )
                fractions.append((stop - start) / whole)
                metrics.batch, metrics.part = (
                    part,
                    ((fractions[-1], start == 0) if size < whole else None),
                )
                outputs.append(add(part, batch_idx, fractions[-1], start == 0))
        finally:
            metrics.batch, metrics.part = batch, None
        return outputs[0] if len(outputs) == 1 else _join(outputs, fractions)

    def _any(self, failed: bool) -> bool:
        if self.engine.num_processes == 1:
            return failed
        return bool(self.engine.reduce(torch.tensor(int(failed)), "max").item())

    def _agreed(self, size: int) -> int:
        """Batches of the processes may have different sizes: the largest part that was tried."""
        return (
            size
            if self.engine.num_processes == 1
            else int(self.engine.reduce(torch.tensor(size), "max").item())
        )


class _Before:
    """What a batch is about to change, and how to undo it."""

    def __init__(self, optimization: Optimization) -> None:
        self.window, self.metrics = optimization.window, optimization.trainer.metrics
        self.module, self.device = optimization.module, optimization.engine.device
        self.gathered = self.window.state()
        self.logged = self.metrics.copies()
        self.states = metric_states(self.module)
        self.rng = rng_state(self.device)
        self.buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        # Gradients of the window's earlier batches are put aside, so that those of a failed attempt can be dropped.
        self.parameters = (
            [p for p in self.module.parameters() if p.requires_grad]
            if self.window.count
            else []
        )
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def keep(self) -> None:
        """The batch is done: add its gradients to those before."""
        for parameter, before in zip(self.parameters, self.gradients, strict=True):
            if before is not None:
                parameter.grad = (
                    before if parameter.grad is None else before.add_(parameter.grad)
                )

    def restore(self) -> None:
        """The batch has to begin again."""
        for parameter in self.module.parameters():
            parameter.grad = None
        for parameter, before in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = before
        self.window.load_state(self.gathered)
        self.metrics.put_back(self.logged)
        load_metric_states(self.module, self.states)
        set_rng_state(self.rng, self.device)
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)


def _join(outputs: list[Any], fractions: list[float]) -> Any:
    """What the step returned for the parts, as if for the whole batch."""
    outputs = [output for output in outputs if output is not None]
    if not outputs:
        return None
    joined: dict[str, Any] = {}
    for key in outputs[0]:
        values = [output[key] for output in outputs]
        if key == "weight":
            joined[key] = sum(values)
        elif key == "loss":
            weights = [
                output.get("weight", fraction)
                for output, fraction in zip(outputs, fractions, strict=False)
            ]
            joined[key] = sum(
                value * weight for value, weight in zip(values, weights, strict=True)
            ) / sum(weights)
        elif all(isinstance(value, Tensor) and value.dim() for value in values):
            joined[key] = torch.cat(values)
        else:
            joined[key] = values
    return joined
