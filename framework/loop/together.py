"""A step that all processes leave together if memory runs out in one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..engine.out_of_memory import is_out_of_memory
from .automatic import AutomaticStep

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from .run import Run


@contextmanager
def leaving_together(engine: Engine) -> Iterator[None]:
    """Raise in all processes if memory runs out within the block in one of them. A collective at its end.

    Within it, processes must not meet: one that ran out of memory would not come.

    Raises:
        torch.OutOfMemoryError: if it did.
    """
    failure = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error)
    failed = torch.tensor(int(failure is not None))
    if engine.num_processes > 1:
        failed = engine.reduce(failed, "max")  # collective
    if failed.item():
        raise torch.OutOfMemoryError(failure or "out of memory in another process")


class TogetherStep(AutomaticStep):
    """As :class:`~.automatic.AutomaticStep`; gradients are averaged after the backward, once it is done everywhere.

    Its arguments and attributes are the same.
    """

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        window = self.accumulation
        window.begin(batch_idx, self.run.schedule.length - batch_idx)
        with leaving_together(self.engine), self.engine.no_sync():
            output = self.call_step(batch, batch_idx)
            # As a part that is the whole batch: so processes do not meet over the batch's weight.
            outputs = self.add_gradients(output, batch_idx, (1.0, True))
        self.stepped = window.is_last and self.end_window(batch_idx)
        return outputs

    def end_window(self, batch_idx: int) -> bool:
        """Step on what the window has gathered; False if it has gathered nothing."""
        if self.accumulation.count:
            self.engine.sync_gradients_of(self.optimizers[0])
        with leaving_together(self.engine):
            return super().end_window(batch_idx)


def together_step(run: Run) -> type[TogetherStep]:
    """The class that takes the place of a fit's step.

    Raises:
        ValueError: if processes meet inside its steps, or it is not automatic.
    """
    strategy = run.engine.strategy
    if not strategy.capabilities.can_delay_sync:
        raise ValueError(
            f'trying whether memory suffices, with {run.engine.num_processes} processes, takes strategy="ddp"; '
            f"{strategy.name!r} lets processes meet in the middle of a step, where one that ran out of memory would "
            "not come"
        )
    if type(run.step) is not AutomaticStep:
        raise ValueError(
            f"trying whether memory suffices, with {run.engine.num_processes} processes, takes automatic optimization "
            "without a closure: in other steps processes meet, and one that ran out of memory would not come"
        )
    return TogetherStep
