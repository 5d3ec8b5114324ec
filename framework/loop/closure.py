"""Automatic optimization by a closure: the optimizer itself calls forward and backward, as often as it needs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..module import Module
from ..subclasses import overrides
from .automatic import LossStep
from .optimizers import LRSchedulerConfig

if TYPE_CHECKING:
    from ..trainer import Trainer
    from .run import Run

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def takes_closure(module: Module, optimizer: Optimizer) -> bool:
    """Whether :class:`ClosureStep` trains: ``optimizer_step`` takes a closure, or nobody overrides it for LBFGS."""
    if not overrides(module, "optimizer_step", Module):
        return needs_closure(optimizer)
    try:
        inspect.signature(module.optimizer_step).bind(*range(4))
    except TypeError:
        return False
    return True


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer cannot step without a closure, such as LBFGS.

    Raises:
        ValueError: if its step takes more than that.
    """
    # The class's method, as a scheduler replaces the object's by a function of its own.
    signature = inspect.signature(type(optimizer).step)
    required = []
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.default is parameter.empty and parameter.kind in _POSITIONAL:
            required.append(parameter.name)
    if len(required) > 1:
        raise ValueError(
            f"{type(optimizer).__name__}.step takes ({', '.join(required)}), and automatic optimization has a closure "
            "for it only: set self.automatic_optimization = False in __init__, and call it in training_step"
        )
    return bool(required)


def check_closure(trainer: Trainer, module: Module, optimizer: Optimizer) -> None:
    """Raise unless the Trainer can let an optimizer call a closure, if it is to.

    Args:
        trainer: whose arguments and strategy these are.
        module: what it trains.
        optimizer: its optimizer.

    Raises:
        ValueError: with the argument that does not go with it.
    """
    if not takes_closure(module, optimizer):
        return
    name = type(optimizer).__name__
    if trainer.micro_batch is not None:
        raise ValueError(
            f"micro_batch={trainer.micro_batch!r} runs a batch in parts, and a closure runs it as a whole "
            f"({type(module).__name__}.optimizer_step, {name}): leave one of them out"
        )
    if not needs_closure(optimizer):
        return
    why = None
    accumulate = trainer.accumulate_grad_batches
    capabilities = trainer.strategy.capabilities
    if accumulate > 1:
        why = f"accumulate_grad_batches={accumulate} takes several: give larger batches"
    elif trainer.engine.scaler is not None:
        why = (
            f"precision={trainer.precision!r} scales the loss of one backward: use "
            'precision="bf16-mixed" or "32-true"'
        )
    elif capabilities.shards_state or not trainer.engine.takes_closures:
        why = f'strategy={trainer.strategy.name!r} steps on parts of it: use strategy="ddp"'
    if why is not None:
        raise ValueError(
            f"{name} computes the loss of one batch, with all parameters, several times in each step, and {why}"
        )


class ClosureStep(LossStep):
    """Trains on a batch inside the optimizer's step, where the optimizer or the module asks for a closure.

    ::

        module.optimizer_step(epoch, batch_idx, optimizer, closure)
            optimizer.step(closure)
                closure:                                # as often as the optimizer calls it
                    training_step
                    zero_grad, if the batch is a window's first
                    backward
                on_before_optimizer_step, clip          # each time after it
                the optimizer's own work

    Where the loss is scaled, or the strategy steps by itself, the closure runs before the optimizer's step. In a window
    of several batches, it runs the last one; the others' gradients are there by then, so it can run only once.

    Its arguments and attributes are those of :class:`~.step.Step`.
    """

    def __init__(
        self,
        run: Run,
        optimizers: list[Optimizer],
        schedulers: list[LRSchedulerConfig],
        kinds: list[str],
    ) -> None:
        super().__init__(run, optimizers, schedulers, kinds)
        self.wants_outputs = True
        # How often the closure has run for this batch, and what callbacks get of the last time.
        self._num_calls = 0
        self._outputs: dict[str, Any] | None = None
        # What gradients were computed of.
        self._loss: Tensor = torch.zeros(())

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        window = self.accumulation
        window.begin(batch_idx, self.run.schedule.length - batch_idx)
        self.stepped = False
        if not window.is_last:
            with self.engine.no_sync():
                output = self.call_step(batch, batch_idx)
                return self.add_gradients(output, batch_idx)
        self._num_calls = 0
        closure = partial(self._train_on, batch, batch_idx)
        self.stepped = self._step_by(closure, batch_idx)
        # What the step has returned is not held until the next one.
        outputs = self._outputs
        self._outputs = None
        return outputs

    def end_window(self, batch_idx: int) -> bool:
        """Step on what the window has gathered; False if it has gathered nothing."""
        if not self.accumulation.count:
            return False
        # The closure finds all batches trained on.
        self._num_calls = 1
        return self._step_by(self._complete, batch_idx)

    def _step_by(self, closure: Callable[[], Tensor | None], batch_idx: int) -> bool:
        """Let the module step by a closure; False if the window has gathered nothing."""
        self.run.module.optimizer_step(
            self.state.epoch, batch_idx, self.manual[0], closure
        )
        self._require_call()
        if not self.accumulation.count:
            return False
        self.count_window()
        return True

    def _require_call(self) -> None:
        """Raise if nobody has called the closure."""
        if not self._num_calls:
            name = type(self.run.module).__name__
            raise RuntimeError(
                f"{name}.optimizer_step has not called its optimizer_closure, which runs training_step and backward: "
                "nothing would be trained. Call optimizer.step(closure=optimizer_closure), or optimizer_closure() "
                "where the optimizer is not to step"
            )

    # The closure.

    @torch.enable_grad()
    def _train_on(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Forward and backward; returns the loss, or None if the batch is left out."""
        if self._num_calls:
            self._begin_again(batch_idx)
        self._num_calls += 1
        output = self.call_step(batch, batch_idx)
        self._outputs = self.add_gradients(output, batch_idx)
        if self.accumulation.count:
            return self._complete()
        optimizer = self.optimizers[0]
        if needs_closure(optimizer):
            raise RuntimeError(
                f"training_step gave no loss for batch {batch_idx}, and {type(optimizer).__name__} cannot leave a "
                "batch out in the middle of its step: return the loss, or drop such batches in the loader"
            )
        # Or else the optimizer would step on the gradients of the window before.
        self.zero_grad(optimizer, batch_idx)
        return None

    def _begin_again(self, batch_idx: int) -> None:
        """Forget the gradients of the closure's last call for this batch."""
        why = None
        if self.accumulation.length > 1:
            why = f"a window of {self.accumulation.length} batches (accumulate_grad_batches)"
        elif self.engine.scaler is not None:
            why = f"precision={self.engine.precision.name!r}, which scales the loss"
        elif not self.engine.takes_closures:
            why = f"strategy={self.engine.strategy.name!r}, which steps by itself"
        if why is not None:
            raise RuntimeError(
                f"optimizer_closure was called twice for batch {batch_idx}, and can be called once in {why}"
            )
        self.accumulation.open(batch_idx, 1)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; arguments as of :class:`~.step.Step`."""
        self._loss = loss.detach()
        super().backward(loss, *args, **kwargs)

    def _complete(self) -> Tensor:
        """Make the gradients those of the step; returns the loss of which they are, the same on all ranks."""
        self.engine.complete_gradients(self.optimizers[0])
        loss = self._loss
        if self.has_ranks:
            # Optimizers decide by the loss how to go on, and all ranks have to go on alike.
            loss = self.engine.reduce(loss, "mean")  # collective
        factor = self.accumulation.factor()
        return loss if factor is None else loss * factor

    # The optimizer's step.

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step an optimizer by a closure, for a module's ``optimizer_step``; returns the loss."""
        evaluate = partial(self._evaluate, optimizer, closure)
        if closure is not None and self.engine.takes_closures:
            return self.engine.step(optimizer, evaluate)
        loss = evaluate()
        if self.accumulation.count:
            self.engine.step(optimizer)
        return loss

    def _evaluate(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Run a closure, then the hooks before a step, and clip."""
        loss = None if closure is None else closure()
        self._require_call()
        if self.accumulation.count:
            self.prepare_step(optimizer)
        return loss
