"""Manual optimization: ``training_step`` computes gradients and steps optimizers itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .optimizers import ManualOptimizer
from .step import Step


class ManualStep(Step):
    """Calls ``training_step``, which does the rest by :class:`~.optimizers.ManualOptimizer`."""

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        window = self.accumulation
        window.begin(batch_idx, self.run.schedule.length - batch_idx)
        self.stepped = False
        output = self.call_step(batch, batch_idx)
        if window.is_last:
            # Optimizers that had no update(loss) in the window's last batch have not stepped yet.
            self._step_all_gathered()
        if self.stepped:
            self._end_window()
        return _outputs(output)

    @property
    def window_is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return any(optimizer.num_gathered for optimizer in self.manual)

    def end_window(self, batch_idx: int) -> bool:
        """Step on what the window has gathered."""
        self._step_all_gathered()
        self._end_window()
        return True

    def _end_window(self) -> None:
        self.accumulation.count_step()
        self.engine.end_window()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, for ``manual_backward``; arguments as of :class:`~.step.Step`."""
        if self.has_ranks and self.accumulation.batch_weight != 1.0:
            loss = loss * self.accumulation.batch_weight
        super().backward(loss, *args, **kwargs)

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step an optimizer, with its hook."""
        if closure is None:
            self.engine.unscale(optimizer)
        for hook in self.run.hooks.on_before_optimizer_step:
            hook(optimizer)
        self.stepped = True
        return self.engine.step(optimizer, closure)

    def update(self, optimizer: ManualOptimizer, loss: Tensor) -> None:
        """Compute gradients of ``loss``, and step at the window's end; see :meth:`ManualOptimizer.update`.

        Raises:
            RuntimeError: if it was called for this batch already, inside a window of several.
        """
        window = self.accumulation
        batch = self.state.total_batches
        batch_idx = self.state.batch_idx
        if window.num_batches > 1 and optimizer.last_update == batch:
            raise RuntimeError(
                f"update(loss) was called twice for one optimizer in batch {batch_idx}; with "
                f"accumulate_grad_batches={window.num_batches} it can be called once a batch"
            )
        if optimizer.num_gathered == 0:
            self.zero_grad(optimizer.optimizer, batch_idx)
        if window.length > 1:
            loss = loss / window.length
        with nullcontext() if window.is_last else self.engine.no_sync():
            self.backward(loss)
        optimizer.count(batch)
        if window.is_last:
            self._step_on_gathered(optimizer)

    def _step_all_gathered(self) -> None:
        """Step each optimizer that has gathered gradients and not stepped on them."""
        for optimizer in self.manual:
            if optimizer.num_gathered:
                self._step_on_gathered(optimizer)

    def _step_on_gathered(self, manual: ManualOptimizer) -> None:
        """Step an optimizer on the mean of the gradients that it has gathered."""
        optimizer = manual.optimizer
        length = self.accumulation.length
        self.engine.unscale(optimizer)
        # Each loss was divided by the window's length, and fewer have come than that.
        if manual.num_gathered < length:
            self.engine.scale_gradients(optimizer, length / manual.num_gathered)
        manual.begin_window()
        self.prepare_step(optimizer)
        self.stepped = True
        self.engine.step(optimizer)


def _outputs(output: Any) -> Any:
    """What callbacks get of a manual step's result: without its graph."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"].detach()}
    return output
