"""Tensors that are still in a checkpoint's files: each process reads the parts that it keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Where a part begins in a tensor: an index in each dimension, or one in the flattened tensor.
Offset = tuple[int, ...] | int


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU to be read into; torch warns where it is to make one of some types itself."""
    size = math.prod(shape) * dtype.itemsize
    return torch.empty(size, dtype=torch.uint8, device="cpu").view(dtype).view(shape)


class StoredTensor(ABC):
    """A tensor in files.

    Args:
        shape: of the whole tensor.
        dtype: its type.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @abstractmethod
    def read(self, into: Tensor, offset: Offset) -> None:
        """Read the part that has the shape of ``into`` and begins at ``offset``; it takes hardly any memory beside."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Read all of it."""

    def part(self, shape: tuple[int, ...], offset: Offset) -> Tensor:
        """Read a part into a tensor of its own, on the CPU."""
        part = empty(shape, self.dtype)
        self.read(part, offset)
        return part

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class StoredState(dict[str, Any]):
    """A dict whose tensors may be in files still: who asks for one by the usual methods of a dict, gets it whole.

    So hooks, optimizers and strategies that know nothing of it find tensors. Those that keep a part look at
    :meth:`stored` instead.
    """

    def stored(self, name: str) -> Any:
        """Return a value as it is: a :class:`StoredTensor`, unless somebody has asked for the tensor, or put one in."""
        return super().__getitem__(name)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, StoredTensor):
            self[name] = value = value.whole()
        return value

    def __iter__(self) -> Iterator[str]:
        # Where a class has this method, dict(state) and {**state} ask for the values as all others do.
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return {**self, **other}

    def __reduce__(self) -> Any:
        return dict, ({**self},)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or ``default``."""
        value = super().get(name, default)
        return self[name] if isinstance(value, StoredTensor) else value

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return a value, which is put in if it is not there."""
        super().setdefault(name, default)
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Take a value out."""
        value = super().pop(name, *default)
        return value.whole() if isinstance(value, StoredTensor) else value

    def popitem(self) -> Any:
        """Take out what was put in last."""
        name = next(reversed(self))
        return name, self.pop(name)

    def values(self) -> Any:
        """All values."""
        return {**self}.values()

    def items(self) -> Any:
        """All names and values."""
        return {**self}.items()

    def copy(self) -> Any:
        """A plain dict of it."""
        return {**self}


def stored_items(state: dict[str, Any]) -> dict[str, Any]:
    """The items of a state as they are, in a plain dict: a :class:`StoredTensor` for each tensor that is in files."""
    if isinstance(state, StoredState):
        return {name: state.stored(name) for name in state}
    return state


def loaded_otherwise(module: nn.Module) -> tuple[str, ...]:
    """What the names begin with of tensors that may not be loaded to their own names, as code of the user's says.

    That is a hook, or a method that overrides torch's: it may leave tensors out, or give them to others, so that they
    must not be changed before it is called.
    """
    if type(module).load_state_dict is not nn.Module.load_state_dict:
        return ("",)
    return tuple(
        f"{name}." if name else ""
        for name, part in module.named_modules()
        if _has_a_say(part)
    )


def _has_a_say(module: nn.Module) -> bool:
    """Whether a module loads its tensors, and those of the modules in it, by code that is not torch's."""
    method = type(module)._load_from_state_dict
    if not method.__module__.startswith("torch.nn.modules."):
        return True
    hooks: Any = module._load_state_dict_pre_hooks.values()
    # Those of FSDP only see to it that the shards are there.
    return not all(
        hook.hook.__module__.startswith("torch.distributed.") for hook in hooks
    )


def filled(
    state: dict[str, Any],
    module: nn.Module,
    present: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A module's state to be loaded: tensors that are in files are read into the module's own, which stand for them.

    Args:
        state: of a checkpoint.
        module: the module, whose tensors are changed, but for those of another shape or type, and those for which the
            user's code has a say.
        present: gives its tensors by name; None for its ``state_dict``.
    """
    items = stored_items(state)
    if not any(isinstance(value, StoredTensor) for value in items.values()):
        return state
    current = (present or module.state_dict)()
    others = loaded_otherwise(module)
    return {
        name: _fill(value, None if name.startswith(others) else current.get(name))
        for name, value in items.items()
    }


def _fill(value: Any, present: Any) -> Any:
    if not isinstance(value, StoredTensor):
        return value
    # A subclass has a format of its own, and what has no shape or memory yet has nothing to be read into.
    is_plain = type(present) is Tensor and not is_lazy(present) and not present.is_meta
    if is_plain and (present.shape, present.dtype) == (value.shape, value.dtype):
        value.read(present, 0)
        return present
    return value.whole()
