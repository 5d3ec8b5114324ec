"""A step that all processes leave together if memory runs out in one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..engine.out_of_memory import leaving_together
from .automatic import AutomaticStep

if TYPE_CHECKING:
    from .run import Run


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
    if strategy.capabilities.can_delay_sync and type(run.step) is AutomaticStep:
        return TogetherStep
    raise ValueError(
        f"to try whether memory suffices, with {run.engine.num_processes} processes, takes automatic optimization "
        f'without a closure, and strategy="ddp", not {strategy.name!r}: elsewhere processes meet in the middle of a '
        "step, where one that ran out of memory would not come"
    )
