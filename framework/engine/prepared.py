"""What ``Engine.prepare`` returns for modules, optimizers and schedulers; loaders.py has the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.batches import map_tensors
from ..messages import log
from .loaders import PreparedLoader
from .wrapper import Wrapper

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from ...strategies.precision import Precision
    from .engine import Engine


class _PreparedModule:
    """A module that shares all attributes with the user's own, and is called through a strategy.

    :func:`prepare_module` makes a class of this one and the module's, and an instance of it that has the module's
    ``__dict__``: it is the module in all but its call, and its ``state_dict`` has the same names. Copying or pickling
    it copies or pickles the module; where the module is sharded, that is an error.
    """

    _prepared_from: Any
    # The strategy's methods to call to train, and to evaluate.
    _prepared_steps: tuple[Any, Any]
    # Whether to convert what is returned back from half precision.
    _prepared_float32: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out the ``__init_subclass__`` of the module's class, which may count or register subclasses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        train, evaluate = self._prepared_steps
        forward = train if torch.is_grad_enabled() else evaluate
        output = forward("__call__", *args, **kwargs)
        return map_tensors(output, _to_float32) if self._prepared_float32 else output

    # For copies __reduce_ex__ would do, but the module's class may have these methods, as a parametrized one has.

    def __copy__(self) -> Any:
        return copy.copy(self._unsharded())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._unsharded(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self._unsharded(),)

    def _unsharded(self) -> nn.Module:
        original: nn.Module = self._prepared_from
        if any(
            hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh")
            for tensor in original.parameters()
        ):
            raise RuntimeError(
                f"this {type(original).__name__} is in parts, as its strategy spreads it over the processes: it cannot "
                "be copied or pickled. Copy it before prepare; save_model and save_state write its weights"
            )
        return original


def _same(item: Any) -> Any:
    """Return what is given: as the constructor in ``__reduce_ex__``, it lets pickle and copy take the user's object."""
    return item


def _to_float32(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def prepare_module(module: nn.Module, strategy: Strategy, precision: Precision) -> Any:
    """A second object for ``module`` whose call is the strategy's step.

    Under autocast the call returns float32, as Accelerate's does.
    """
    kind = type(module)
    members = {
        "_prepared_from": module,
        "_prepared_steps": (strategy.forward, strategy.evaluate),
        "_prepared_float32": precision.compute is not None,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__qualname__": kind.__qualname__,
    }
    prepared = object.__new__(type(kind.__name__, (_PreparedModule, kind), members))
    object.__setattr__(prepared, "__dict__", module.__dict__)
    # What its classes keep in slots is not in ``__dict__``.
    for parent in kind.__mro__:
        slots = vars(parent).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(module, name):
                object.__setattr__(prepared, name, getattr(module, name))
    return prepared


def unwrapped(item: Any) -> Any:
    """What the user gave to ``prepare``, if ``item`` is what it returned; anything else is returned as it is."""
    if isinstance(item, _PreparedModule):
        return item._prepared_from
    if isinstance(item, PreparedOptimizer):
        return item.optimizer
    if isinstance(item, PreparedScheduler):
        return item.scheduler
    if isinstance(item, PreparedLoader):
        return item.loader
    return item


class PreparedOptimizer(Wrapper, Optimizer):
    """An optimizer that steps once in each accumulation window. Everything else is the optimizer's own.

    Attributes:
        optimizer: the user's optimizer.
        engine: the engine that prepared it.
        strategy: that of the module that it trains.
        step_was_skipped: whether its last step was left out, as a gradient overflowed in half precision.
    """

    _wraps = "optimizer"

    # Optimizer's own constructor is not called: groups and state are those of the wrapped optimizer.
    def __init__(
        self,
        optimizer: Optimizer,
        engine: Engine,
        strategy: Strategy,
    ) -> None:
        self.optimizer = optimizer
        self.engine = engine
        self.strategy = strategy
        self.step_was_skipped = False
        # Whether it has stepped in this window.
        self._stepped = False
        # Whether it has stepped, and its gradients are still to be cleared.
        self._to_clear = False
        # Whether zero_grad() came before a step, at the window's last micro-batch: the next window drops the gradients.
        self._given_up = False
        # The strategy's count of synchronised forwards at the last step.
        self._synced_forwards = 0

    # Properties, so that setting them is an error: it would not reach the optimizer.
    state: Any = property(attrgetter("optimizer.state"))
    param_groups: Any = property(attrgetter("optimizer.param_groups"))
    defaults: Any = property(attrgetter("optimizer.defaults"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``Optimizer.add_param_group``."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state."""
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> Any:
        """Call the optimizer's own ``train``, where it has one (schedule-free optimizers)."""
        return getattr(self.optimizer, "train", lambda: None)()

    def eval(self) -> Any:
        """Call the optimizer's own ``eval``, where it has one."""
        return getattr(self.optimizer, "eval", lambda: None)()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; inside a window, nothing is done, as they are still to be stepped on.

        Loops that clear before the backward pass call this at a window's last micro-batch before they step. So it does
        nothing there either; but if no step follows, the next window begins without these gradients.
        """
        if self._stepped or self._to_clear or self.engine.accumulation.length == 1:
            self._to_clear = False
            self.optimizer.zero_grad(set_to_none)
        else:
            self._given_up = self.engine.sync_gradients

    def begin_window(self) -> None:
        """Begin a window, without gradients of one that was given up."""
        if self._given_up and not self._stepped:
            self.optimizer.zero_grad()
        self._stepped = self._given_up = False

    def sync_missed_gradients(self) -> None:
        """Average the gradients if no call of the prepared module has done so since the last step. Then, a collective.

        That is so where only submodules, or methods other than the call, were used.
        """
        # The strategy counts forwards whose backward averages gradients.
        forwards = self.strategy.synced_forwards
        if forwards is not None and forwards == self._synced_forwards:
            self.engine.sync_gradients_of(self.optimizer)
        self._synced_forwards = forwards or 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on the window's gradients; inside a window, nothing is done."""
        engine = self.engine
        if not engine.accumulation.is_last:
            return None
        result = engine.step_prepared(self.optimizer, closure)
        self._stepped = self._to_clear = True
        if engine.scaler is not None or engine.strategy.capabilities.owns_loss_scale:
            self.step_was_skipped = engine.step_was_skipped
        return result

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.optimizer,)


class PreparedScheduler(Wrapper):
    """A scheduler that steps once in each accumulation window, and not where its optimizer's step was skipped.

    It steps once however many processes there are: its schedule counts optimizer steps.

    Attributes:
        scheduler: the user's scheduler; its attributes can be read through this.
        engine: the engine that prepared it.
    """

    _wraps = "scheduler"

    def __init__(self, scheduler: Any, engine: Engine) -> None:
        self.scheduler = scheduler
        self.engine = engine
        # Whether to say at the first step what it counts, as other libraries count otherwise.
        self._explains = engine.num_processes > 1 and engine.is_main_process

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, with the scheduler's own arguments; inside a window, nothing is done."""
        if not self.engine.accumulation.is_last:
            return
        if self._explains:
            self._explains = False
            log.info(
                "scheduler.step() counts one step, not one for each of the %d processes as Accelerate does: a schedule "
                "counts optimizer steps",
                self.engine.num_processes,
            )
        optimizer = getattr(self.scheduler, "optimizer", None)
        prepared = self.engine.prepared.find_optimizer(optimizer)
        if prepared is None or not prepared.step_was_skipped:
            self.scheduler.step(*args, **kwargs)

    # A copy does not take the engine along.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.scheduler,)
