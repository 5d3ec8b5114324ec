"""What ``Engine.prepare`` returns: modules, optimizers, schedulers and loaders for a loop of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.batches import map_tensors
from .loaders import PreparedLoader

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from ...strategies.precision import Precision
    from .engine import Engine


# -- modules ----------------------------------------------------------------------------------------------------------


class _PreparedModule:
    """A module's second face: it shares its attributes, and is called through a strategy.

    :func:`prepare_module` makes a class of this and the module's own, whose instance has the module's ``__dict__``: so
    it is the module in all but its call, without a name more in its ``state_dict``. A copy of it is one of the module,
    with weights of its own, and so is what is pickled; that of a module in parts is refused.
    """

    _original: Any
    _run: tuple[Callable[..., Any], Callable[..., Any]]
    _single: bool  # whether what it returns is to be converted back from half precision

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The face is no subclass that the module's author wants to know of."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        train, evaluate = self._run
        output = (train if torch.is_grad_enabled() else evaluate)(
            "__call__", *args, **kwargs
        )
        return map_tensors(output, _to_single) if self._single else output

    # The module's class may define these, as parametrized modules do; they would copy the face.

    def __copy__(self) -> Any:
        return copy.copy(self._whole())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._whole(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self._whole(),)

    def _whole(self) -> nn.Module:
        original: nn.Module = self._original
        if any(
            hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh")
            for tensor in original.parameters()
        ):
            raise RuntimeError(
                f"this {type(original).__name__} is in parts, as its strategy spreads it over the processes: it cannot "
                "be copied or pickled. Copy it before prepare; save_model and save_state write its weights"
            )
        return original


def _same(module: Any) -> Any:
    return module


def _to_single(tensor: Any) -> Any:
    return (
        tensor.float()
        if isinstance(tensor, Tensor)
        and tensor.dtype in (torch.float16, torch.bfloat16)
        else tensor
    )


def prepare_module(module: nn.Module, strategy: Strategy, precision: Precision) -> Any:
    """A face of ``module`` whose call is the strategy's step; under autocast it returns float32, as Accelerate does."""
    kind = type(module)
    members = {
        "_original": module,
        "_run": (strategy.forward, strategy.evaluate),
        "_single": precision.compute is not None,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__qualname__": kind.__qualname__,
    }
    face = object.__new__(type(kind.__name__, (_PreparedModule, kind), members))
    object.__setattr__(face, "__dict__", module.__dict__)
    for name in (
        name
        for parent in kind.__mro__
        for name in _slots(parent)
        if hasattr(module, name)
    ):
        object.__setattr__(face, name, getattr(module, name))
    return face


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def bare(item: Any) -> Any:
    """What is behind anything that was prepared."""
    if isinstance(item, PreparedOptimizer):
        return item.optimizer
    if isinstance(item, PreparedScheduler):
        return item.scheduler
    return item.loader if isinstance(item, PreparedLoader) else unwrap(item)


def unwrap(module: Any) -> Any:
    """The module behind a prepared one."""
    return module._original if isinstance(module, _PreparedModule) else module


# -- optimizers and schedulers ----------------------------------------------------------------------------------------


class PreparedOptimizer(Optimizer):
    """An optimizer that steps once a window. Everything else is the optimizer's own.

    Attributes:
        optimizer: the optimizer.
        step_was_skipped: whether its last step was left out, as a gradient overflowed in half precision.
    """

    def __init__(
        self, optimizer: Optimizer, engine: Engine
    ) -> None:  # not Optimizer's: it is the other's face
        self.optimizer = optimizer
        self.engine = engine
        self.step_was_skipped = False
        self._stepped = False  # in this window
        self._to_clear = False  # it has stepped since its gradients were cleared
        self._given_up = (
            False  # the window's gradients are to be cleared, unless it steps
        )

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] # as Optimizer says it, but read only
        """The optimizer's."""
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] # as above
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        """The optimizer's."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``Optimizer.add_param_group``."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
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
        """Clear the gradients, but not those of a window in which it is still to step.

        A window of several micro-batches that ends without a step is given up by it.
        """
        if self._stepped or self._to_clear or self.engine.window.length == 1:
            self._to_clear = False
            self.optimizer.zero_grad(set_to_none)
        else:
            self._given_up = self.engine.sync_gradients

    def begin_window(self) -> None:
        """A window begins."""
        if self._given_up and not self._stepped:
            self.optimizer.zero_grad()
        self._stepped = self._given_up = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on the window's gradients; inside a window, nothing is done."""
        engine = self.engine
        if not engine.sync_gradients:
            return None
        result = engine.step_prepared(self.optimizer, closure)
        self._stepped = self._to_clear = True
        if engine.scaler is not None or engine.strategy.owns_loss_scale:
            self.step_was_skipped = engine.step_was_skipped
        return result

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.optimizer,)


class PreparedScheduler:
    """A scheduler that steps once a window, and not where its optimizer's step was skipped.

    It steps once however many processes there are: its schedule counts optimizer steps.

    Attributes:
        scheduler: the scheduler; its attributes can be read through this.
    """

    def __init__(self, scheduler: Any, engine: Engine) -> None:
        self.scheduler = scheduler
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, with the scheduler's own arguments; inside a window, nothing is done."""
        if self.engine.sync_gradients and not self.engine.step_of_was_skipped(
            getattr(self.scheduler, "optimizer", None)
        ):
            self.scheduler.step(*args, **kwargs)

    def __reduce_ex__(
        self, protocol: Any
    ) -> Any:  # a copy does not take the engine along
        return _same, (self.scheduler,)


# -- loaders ----------------------------------------------------------------------------------------------------------
