"""Optimizers that a module steps by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..engine.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .step import Optimization


class ManualOptimizer(Wrapper):
    """What ``self.optimizers()`` gives in manual optimization: an optimizer whose steps honour hooks and precision.

    Attributes of the optimizer itself can be read through it.
    """

    _wraps = "optimizer"

    def __init__(self, optimizer: Optimizer, optimization: Optimization) -> None:
        self.optimizer = optimizer
        self._optimization = optimization
        self._updated: int | None = None  # the batch of the last update()
        self._gathered = 0  # batches whose gradients wait for the window's end

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step: unscale, hooks, optimizer."""
        if kwargs:
            raise TypeError(f"step takes a closure only; got {', '.join(kwargs)}")
        return self._optimization.step(self.optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Let only this optimizer's parameters require gradients; ``sync_grad=False`` keeps gradients local."""
        with nullcontext() if sync_grad else self._optimization.engine.no_sync():
            self._optimization.toggle(self)
            try:
                yield
            finally:
                self._optimization.untoggle()

    def update(self, loss: Tensor) -> None:
        """Do for ``loss`` all that automatic optimization does.

        Clears the gradients at a window's first batch, divides the loss by the window's length
        (``accumulate_grad_batches``), computes gradients, and at the window's last batch clips and steps.
        """
        self._optimization.update(self, loss)
