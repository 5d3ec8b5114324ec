"""Batches in parts: as many samples at once as memory holds, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import batch_size_of, slice_batch
from ..engine.out_of_memory import free_memory, leaving_together
from ..messages import log
from .rollback import StepRollback

if TYPE_CHECKING:
    from .automatic import AutomaticStep


# Runs the step on a part of a batch and adds its gradients; see :meth:`MicroBatches.train_on`.
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
        step: whose batches these are.
        size: samples at once, or ``"auto"``.
    """

    def __init__(self, step: AutomaticStep, size: int | str) -> None:
        self.step = step
        self.engine = step.engine
        self.state = step.state
        self.metrics = step.run.metrics
        self.auto = size == "auto"
        if not self.auto:
            self.state.use_micro_batch(int(size))

    def train_on(self, batch: Any, batch_idx: int, add: _Add) -> Any:
        """Add a batch's gradients to the window's, part by part.

        Args:
            batch: the batch.
            batch_idx: its index.
            add: runs the step on a part and adds its gradients, given the part, the index, the part's fraction, and
                whether it is the first.
        """
        try:
            num_samples = batch_size_of(batch)
        except ValueError as error:
            raise ValueError(
                f"micro_batch: a batch is divided along its first dimension, and {error}"
            ) from None
        if not self.auto:
            size = min(self.state.micro_batch or num_samples, num_samples)
            return self._run(batch, batch_idx, num_samples, size, add)
        while True:
            size = min(self.state.micro_batch or num_samples, num_samples)
            before = StepRollback(
                self.step.run.module,
                self.engine.device,
                self.step.accumulation,
                self.metrics,
            )
            try:
                with leaving_together(self.engine):
                    outputs = self._run(batch, batch_idx, num_samples, size, add)
            except torch.OutOfMemoryError as error:
                failure = str(error)
            else:
                before.keep()
                return outputs
            before.undo()
            free_memory(self.engine.device)
            self._halve(self._largest(size), batch_idx, failure)

    def _halve(self, size: int, batch_idx: int, failure: str) -> None:
        """Go on with half as many samples at once as have been tried."""
        if size == 1:
            raise torch.OutOfMemoryError(
                f'micro_batch="auto": memory does not suffice for a single sample (batch {batch_idx}): '
                f"{failure}"
            )
        # Rounded up, so that two parts of this size hold what has been tried.
        half = -(-size // 2)
        self.state.use_micro_batch(half)
        log.info("Out of memory with %d samples at once: going on with %d", size, half)

    def _run(
        self, batch: Any, batch_idx: int, num_samples: int, size: int, add: _Add
    ) -> Any:
        """Run the step on one part of the batch after the other; returns what callbacks get of the whole."""
        outputs: list[Any] = []
        fractions: list[float] = []
        try:
            for start in range(0, num_samples, size):
                stop = min(start + size, num_samples)
                part = batch
                if size < num_samples:
                    part = slice_batch(batch, start, stop, num_samples)
                fraction = (stop - start) / num_samples
                fractions.append(fraction)
                self.metrics.begin_part(
                    part, (fraction, start == 0) if size < num_samples else None
                )
                # A batch counts once in its window, by the first part that has a loss.
                is_first = all(output is None for output in outputs)
                outputs.append(add(part, batch_idx, fraction, is_first))
        finally:
            self.metrics.begin_part(batch, None)
        return outputs[0] if len(outputs) == 1 else _join(outputs, fractions)

    def _largest(self, size: int) -> int:
        """The largest part that any rank has tried, as their batches may have different sizes. A collective."""
        if self.engine.num_processes == 1:
            return size
        return int(self.engine.reduce(torch.tensor(size), "max").item())


def _join(outputs: list[Any], fractions: list[float]) -> Any:
    """What the step returned for the parts, as if for the whole batch; parts without a loss are left out."""
    parts = zip(outputs, fractions, strict=True)
    parts = [(output, fraction) for output, fraction in parts if output is not None]
    outputs = [output for output, _ in parts]
    if not outputs:
        return None
    joined: dict[str, Any] = {}
    for key in outputs[0]:
        values = [output[key] for output in outputs]
        if key == "weight":
            joined[key] = sum(values)
        elif key == "loss":
            weights = [output.get("weight", fraction) for output, fraction in parts]
            pairs = zip(values, weights, strict=True)
            joined[key] = sum(value * weight for value, weight in pairs) / sum(weights)
        elif all(isinstance(value, Tensor) and value.dim() for value in values):
            joined[key] = torch.cat(values)
        else:
            joined[key] = values
    return joined
