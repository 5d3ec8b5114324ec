"""Undoing what a step or an evaluation has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..metrics.metric_state import load_metric_states, metric_states
from ..seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from ..engine.accumulation import GradientAccumulation
    from ..metrics.metrics import Metrics


class Rollback:
    """Keeps what an evaluation is about to change, to undo it: states of torchmetrics and of random generators.

    Args:
        module: whose torchmetrics.
        device: whose random generator, beside those of the CPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self._metric_states = metric_states(module)
        self._rng = rng_state(device)

    def undo(self) -> None:
        """Put everything back as it was."""
        load_metric_states(self.module, self._metric_states)
        set_rng_state(self._rng, self.device)


class StepRollback(Rollback):
    """Keeps what forward and backward of a training step are about to change: gradients and buffers, too.

    Gradients of the window's earlier batches are put aside, so that those of a failed attempt can be dropped.

    Args:
        module: what is trained.
        device: whose random generator, beside those of the CPU.
        window: what has been gathered for the next optimizer step.
        metrics: what has been logged.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        window: GradientAccumulation,
        metrics: Metrics,
    ) -> None:
        super().__init__(module, device)
        self._window = window
        self._gathered = window.state()
        self._metrics = metrics
        self._logged = metrics.copy_values()
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._gradients: list[tuple[nn.Parameter, torch.Tensor | None]] = []
        for parameter in module.parameters() if window.count else ():
            if parameter.requires_grad:
                self._gradients.append((parameter, parameter.grad))
                parameter.grad = None

    def keep(self) -> None:
        """Add the batch's gradients to those that were put aside."""
        for parameter, earlier in self._gradients:
            if earlier is None:
                continue
            if parameter.grad is None:
                parameter.grad = earlier
            else:
                parameter.grad = earlier.add_(parameter.grad)

    def undo(self) -> None:
        """Put everything back as it was before the batch."""
        for parameter in self.module.parameters():
            parameter.grad = None
        for parameter, earlier in self._gradients:
            parameter.grad = earlier
        self._window.load_state(self._gathered)
        self._metrics.restore_values(self._logged)
        super().undo()
        with torch.no_grad():
            for buffer, earlier in self._buffers:
                buffer.copy_(earlier)
