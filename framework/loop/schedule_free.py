"""Optimizers that train at other weights than those to evaluate and save, as the package schedulefree has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...callbacks.weight_set import WeightSet

if TYPE_CHECKING:
    from .run import Run


class ScheduleFree:
    """Calls ``train()`` and ``eval()`` of a fit's optimizers that have them; nothing, if none does.

    The two compute one kind of weights from the other, not exactly so. So those that are trained are kept meanwhile.

    Args:
        run: the fit.
        optimizers: all of its optimizers.

    Attributes:
        optimizers: those with the two methods.
        weights: at which they train, as long as the module has those to evaluate and save.

    Raises:
        ValueError: if the strategy trains copies of the weights, of which these methods know nothing.
    """

    def __init__(self, run: Run, optimizers: list[Any]) -> None:
        self.optimizers = [
            optimizer
            for optimizer in optimizers
            if hasattr(optimizer, "train") and hasattr(optimizer, "eval")
        ]
        self.weights = WeightSet("training")
        self._place = (run.module, run.engine.strategy)
        strategy = run.engine.strategy
        if self.optimizers and strategy.capabilities.owns_loss_scale:
            raise ValueError(
                f"strategy={strategy.name!r} trains copies of the weights, which train() and eval() of "
                f'{type(self.optimizers[0]).__name__} do not change; strategy="fsdp" and "ddp" can'
            )

    def train(self) -> None:
        """Train from now on, exactly at the weights of before :meth:`eval`, if there are some."""
        for optimizer in self.optimizers:
            optimizer.train()
        self.weights.restore(*self._place)
        self.weights.clear()

    def eval(self) -> bool:
        """Let the module have the weights to evaluate and save; False if it has them, as where a hook does this."""
        if self.weights.tensors or not any(map(_is_training, self.optimizers)):
            return False
        self.weights.begin(*self._place)
        self.weights.update(*self._place, lambda *_: None)
        for optimizer in self.optimizers:
            optimizer.eval()
        return True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the module has the weights to evaluate and save."""
        is_changed = self.eval()
        try:
            yield
        finally:
            if is_changed:
                self.train()


def _is_training(optimizer: Any) -> bool:
    return optimizer.param_groups[0].get("train_mode", True)
