"""Which memory a step takes, and when: the storages of tensors, as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A step that reads so many values has no end, such as a loop until a loss is small.
_MOST_READS = 300

_aten = torch.ops.aten


class CannotTrace(Exception):
    """The step cannot be followed without its values."""


@dataclass(frozen=True)
class Event:
    """Something that a strategy acts on.

    Attributes:
        kind: ``"forward"`` and ``"forwarded"`` at a module's begin and end, ``"backward"`` when its outputs have their
            gradients, ``"gradient"`` when a parameter has its own, ``"end"``.
        key: the module's or parameter's number.
        live: bytes that are alive, but for parameters, buffers and their gradients.
        peak: the most of them since the last event.
    """

    kind: str
    key: int
    live: int
    peak: int


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until each of them is let go.

    It also answers what fake tensors cannot: a value that the program reads is 1, and a selection takes everything.

    Attributes:
        live: bytes that are alive.
        peak: the most of them since :meth:`take_peak`.
        events: what :meth:`note` has noted.
        guesses: what was answered so, in words, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.events: list[Event] = []
        self.guesses: dict[str, int] = {}
        # Storages by their address: a weak reference that ends their count, and their bytes.
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            output = func(*args, **kwargs)
        except DataDependentOutputException:
            output = self._read(func, args)
        except DynamicOutputShapeException:
            output = self._select(func, args)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return output

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted or left out already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = storage.nbytes()
        ended = weakref.ref(storage, lambda _: self._let_go(address))
        self._storages[address] = (ended, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor's storage, from now on."""
        self.count(tensor)
        address = tensor.untyped_storage()._cdata
        ended, size = self._storages[address]
        self.live -= size
        self._storages[address] = (ended, 0)

    def _let_go(self, address: int) -> None:
        _, size = self._storages.pop(address)
        self.live -= size

    def take_peak(self) -> int:
        """Return the highest count since the last call."""
        peak = max(self.peak, self.live)
        self.peak = self.live
        return peak

    def note(self, kind: str, key: int = 0) -> None:
        """Note an event."""
        peak = self.take_peak()
        self.events.append(Event(kind, key, self.live, peak))

    def _guess(self, what: str) -> None:
        self.guesses[what] = self.guesses.get(what, 0) + 1
        if self.guesses[what] > _MOST_READS:
            raise CannotTrace(f"it {what} again and again, as if in a loop without end")

    def _read(self, func: Any, args: Any) -> Any:
        """Return a value that the program reads."""
        if func is _aten._local_scalar_dense.default:
            self._guess("reads values of tensors, such as by .item()")
            dtype = args[0].dtype
            if dtype == torch.bool:
                return True
            return 1.0 if dtype.is_floating_point else 1
        if func in (_aten.equal.default, _aten.is_nonzero.default):
            self._guess("compares tensors")
            return True
        raise CannotTrace(f"{func} depends on values")

    def _select(self, func: Any, args: Any) -> Any:
        """Return what is selected by values, as if it was everything."""
        first = args[0]
        made = "selects by values, such as x[mask]"
        if func is _aten.nonzero.default:
            self._guess(made)
            shape = (first.numel(), first.dim())
            return torch.empty(shape, dtype=torch.int64, device=first.device)
        if func is _aten.masked_select.default:
            self._guess(made)
            return first.new_empty((max(first.numel(), args[1].numel()),))
        if func is _aten.index.Tensor:
            self._guess(made)
            return func(first, _as_numbers(args[1]))
        raise CannotTrace(f"{func} has an output whose shape depends on values")


def _as_numbers(indices: Any) -> list[Any]:
    """Return indices with numbers of all elements in the place of masks."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            shape = (index.numel(),)
            number = torch.empty(shape, dtype=torch.int64, device=index.device)
            found += [number] * index.dim()
        else:
            found.append(index)
    return found


@contextmanager
def noting_modules(
    tracker: Tracker, numbers: dict[Any, int], in_backward: Callable[[], bool]
) -> Iterator[None]:
    """Note where modules begin and end, in the forward pass and in the backward pass.

    Args:
        tracker: notes it.
        numbers: by module, those that are noted.
        in_backward: whether a forward is one that activation checkpointing repeats.
    """

    def enter(module: Any, inputs: Any) -> None:
        if module in numbers and not in_backward():
            tracker.note("forward", numbers[module])

    def leave(module: Any, inputs: Any, output: Any) -> None:
        if module not in numbers or in_backward():
            return
        number = numbers[module]
        tracker.note("forwarded", number)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(lambda _: tracker.note("backward", number))

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
