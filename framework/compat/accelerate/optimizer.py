"""Accelerate's prepared optimizers, schedulers and windows: the Engine's, where they behave otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ....strategies import DDPStrategy
from ...engine.accumulation import GradientAccumulation, StepCounter
from ...engine.prepare import Prepared
from ...engine.prepared import PreparedOptimizer, PreparedScheduler
from .loaders import PositionOf
from .state import GradientState, PartialState

if TYPE_CHECKING:
    from ....strategies import Strategy
    from .accelerator import Accelerator


class Window(GradientAccumulation):
    """An accumulation window as Accelerate has it: each loss is divided by the same number, however short the window.

    Where it ends, is in :class:`~.state.GradientState`, which all Accelerators share and programs may set.

    Args:
        strategy, counter: as of the Engine's windows.

    Attributes:
        step: batches since the last window ended.
    """

    def __init__(self, strategy: Strategy, counter: StepCounter) -> None:
        state = GradientState()
        syncs = state.sync_gradients
        super().__init__(strategy, state.num_steps, counter)
        state.sync_gradients = syncs
        self.step = 0

    @property
    def is_last(self) -> bool:
        """Whether optimizers step after the running batch."""
        return GradientState().sync_gradients

    @is_last.setter
    def is_last(self, value: bool) -> None:
        GradientState().sync_gradients = value

    @property
    def num_batches(self) -> int:
        """Batches of a window."""
        return GradientState().num_steps

    @num_batches.setter
    def num_batches(self, steps: int) -> None:
        GradientState().plugin_kwargs["num_steps"] = steps

    @property
    def length(self) -> int:
        """By what losses are divided."""
        return self.num_batches

    @length.setter
    def length(self, value: int) -> None:
        """Leave it: windows that are shorter divide by the same number."""

    def begin_next(self) -> None:
        """Begin the next batch: the last of its window if as many have come, or if its loader ends with it."""
        state = GradientState()
        if state.sync_with_dataloader and state.end_of_dataloader:
            self.step = 0
            self.is_last = True
        else:
            self.step += 1
            self.is_last = self.step % self.num_batches == 0
        self.begun += 1

    def add(self, loss: Tensor, weight: Any = None) -> Tensor:
        """Count a batch, and divide its loss."""
        if weight is not None:
            return super().add(loss, weight)
        self.count += 1
        return loss / self.length if self.length > 1 else loss

    def factor(self) -> Any:
        """What to multiply gradients with before the step: nothing, without weights."""
        return None if self.weight is None else super().factor()


class AcceleratedOptimizer(PreparedOptimizer):
    """An optimizer that steps, and clears gradients, at the end of each window."""

    _is_accelerate_prepared = True
    engine: Accelerator

    @property
    def _is_overflow(self) -> bool:
        """Accelerate's own name of ``step_was_skipped``."""
        return self.step_was_skipped

    @_is_overflow.setter
    def _is_overflow(self, value: bool) -> None:
        self.step_was_skipped = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; inside a window, nothing is done."""
        if self.engine.sync_gradients:
            self.optimizer.zero_grad(set_to_none)

    def sync_missed_gradients(self) -> None:
        """Average gradients that no call of the prepared module has averaged, unless ``no_sync`` has asked for that."""
        if not self.engine.takes_local():
            super().sync_missed_gradients()


class AcceleratedScheduler(PreparedScheduler):
    """A scheduler that steps at the end of each window, as often as there are processes.

    So a schedule counts the batches of all processes, as if they were read by one.

    Args:
        scheduler: the program's.
        optimizers: one, or several, whose skipped steps it skips.
        step_with_optimizer: False steps once in each call, whatever the optimizers do.
        split_batches: the processes divide each batch, so that a step counts once.
    """

    _is_accelerate_prepared = True

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
    ) -> None:
        self.scheduler = scheduler
        is_several = isinstance(optimizers, (list, tuple))
        self.optimizers = list(optimizers) if is_several else [optimizers]
        self.step_with_optimizer = step_with_optimizer
        self.split_batches = split_batches
        self.gradient_state = GradientState()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, with the scheduler's own arguments."""
        scheduler = self.scheduler
        if not self.step_with_optimizer:
            scheduler.step(*args, **kwargs)
            return
        state = GradientState()
        if not state.sync_gradients:
            if state.adjust_scheduler:
                scheduler._step_count += 1
            return
        if any(getattr(item, "step_was_skipped", False) for item in self.optimizers):
            return
        if self.split_batches:
            scheduler.step(*args, **kwargs)
            return
        for _ in range(PartialState().num_processes):
            # A schedule of a fixed length, such as OneCycleLR, refuses steps after its end.
            total = getattr(scheduler, "total_steps", None)
            if total is None or scheduler._step_count <= total:
                scheduler.step(*args, **kwargs)


class AcceleratorsPrepared(Prepared):
    """What an Accelerator has prepared."""

    def new_module(self, module: nn.Module, strategy: Strategy) -> Any:
        """What stands for a module: with several processes it also has what DDP has, such as ``module``."""
        prepared = super().new_module(module, strategy)
        if strategy.world_size > 1:
            _give(prepared, "module", property(lambda _: module))
            _give(prepared, "no_sync", lambda _: self.accelerator.no_sync(prepared))
            if isinstance(strategy, DDPStrategy):
                _fall_back(prepared, strategy)
        return prepared

    def new_optimizer(
        self, optimizer: Optimizer, strategy: Strategy
    ) -> AcceleratedOptimizer:
        """What stands for an optimizer from now on."""
        return AcceleratedOptimizer(optimizer, self.accelerator, strategy)

    @property
    def positioned_loaders(self) -> list[Any]:
        """The positions of loaders that checkpoints hold."""
        loaders: list[Any] = list(super().positioned_loaders)
        return [PositionOf(loader) for loader in loaders]

    @property
    def accelerator(self) -> Any:
        """The Accelerator."""
        return self._engine


def _fall_back(prepared: nn.Module, strategy: DDPStrategy) -> None:
    """Let a prepared module give what it lacks, and DDP around the module has."""
    kind = type(prepared)
    of_module = kind.__getattr__

    def find(self: nn.Module, name: str) -> Any:
        try:
            return of_module(self, name)
        except AttributeError:
            if name.startswith("_") or not hasattr(strategy.joinable, name):
                raise
            return getattr(strategy.joinable, name)

    setattr(kind, "__getattr__", find)  # noqa: B010 # of the class that was made for this module


def mark(module: nn.Module) -> None:
    """Say of a module that it is prepared, as programs ask."""
    module._is_accelerate_prepared = True  # type: ignore[assignment] # modules take any attribute


def _give(prepared: nn.Module, name: str, value: Callable[..., Any] | property) -> None:
    """Add something to the class that was made for this module, unless the module has something of that name."""
    if not hasattr(prepared, name):
        setattr(type(prepared), name, value)
