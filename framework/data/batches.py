"""Batches of any nesting: reading, changing and moving their tensors.

Containers are mappings, lists, tuples, named tuples and dataclasses, and their subclasses, whatever methods these have.
Reading walks through them. Changing copies each of them and sets its values in the copy: no constructor is called, so
all else that a container holds stays as it was.
"""

from __future__ import annotations

import copy
import operator
from collections import UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

LISTS = (list, UserList, deque)


def children(batch: Any) -> Iterable[Any] | None:
    """The values in a container; None for anything else, such as a tensor, a ``PackedSequence`` or a graph."""
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (tuple, *LISTS)):
        return None if isinstance(batch, PackedSequence) else batch
    if _is_record(batch):
        return [
            getattr(batch, field.name)
            for field in fields(batch)
            if hasattr(batch, field.name)
        ]
    return None


def leaves(batch: Any) -> Iterator[Any]:
    """What is no container itself, of all that the batch and the containers in it hold."""
    values = children(batch)
    if values is None:
        yield batch
        return
    for value in values:
        yield from leaves(value)


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy the batch's containers, with ``function`` applied to all tensors; the rest stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    return rebuild(batch, partial(map_tensors, function=function))


def rebuild(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Copy a container, with ``function`` applied to each of its values; what is no container is returned.

    A container that cannot be copied is returned as well if it would hold the same tensors.

    Raises:
        TypeError: for a container that cannot be copied, or does not take the values.
    """
    if type(batch) is dict:
        return {key: function(value) for key, value in batch.items()}
    if type(batch) is list:
        return [function(value) for value in batch]
    if isinstance(batch, PackedSequence):
        return batch
    if isinstance(batch, tuple):
        return _tuple_with(batch, [function(value) for value in batch])
    read = operator.getitem
    write = operator.setitem
    if isinstance(batch, Mapping):
        items = dict(batch.items())
    elif isinstance(batch, LISTS):
        items = dict(enumerate(batch))
    elif _is_record(batch):
        items = _attributes(batch)
        read = getattr
        write = _set_attribute
    else:
        return batch
    changed = {key: function(value) for key, value in items.items()}
    return _copy_with(batch, changed, read, write)


def _is_record(batch: Any) -> bool:
    return is_dataclass(batch) and not isinstance(batch, type)


def _attributes(batch: Any) -> dict[str, Any]:
    """A dataclass's fields by name, and its other attributes that hold tensors, such as a cached property."""
    names = [field.name for field in fields(batch)]
    for name, value in getattr(batch, "__dict__", {}).items():
        if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            names.append(name)
    return {name: getattr(batch, name) for name in names if hasattr(batch, name)}


def _set_attribute(
    obj: Any,
    name: str,
    value: Any,
) -> None:
    try:
        setattr(obj, name, value)
    except AttributeError:
        # The dataclass is frozen, but this is a copy that nobody has yet.
        object.__setattr__(obj, name, value)


def _tuple_with(batch: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    if type(batch) is tuple:
        return tuple(values)
    if all(map(operator.is_, batch, values)):
        return batch
    try:
        made = tuple.__new__(type(batch), values)
    except TypeError:
        # Those of torch, such as torch.return_types.max, take their values in the constructor only.
        return type(batch)(values)
    getattr(made, "__dict__", {}).update(getattr(batch, "__dict__", {}))
    return made


def _copy_with(
    batch: Any,
    items: dict[Any, Any],
    get: Callable[..., Any],
    put: Callable[..., None],
) -> Any:
    """A copy of a container with other values, which are read again: a container may change what it is given."""
    made: Any = None
    reason: Any = "it does not keep the values that it is given"
    try:
        made = _set_in_copy(batch, items, get, put)
        kept = all(get(made, key) is value for key, value in items.items())
    except Exception as error:
        # A user's container may raise anything.
        reason = error
        kept = False
    if (
        not kept
        and isinstance(batch, Mapping)
        and len(getattr(batch, "__dict__", ())) < 2
    ):
        # What cannot be changed and holds nothing but its items loses nothing if it is constructed anew, and mappings
        # take their items so.
        with suppress(Exception):
            made = type(batch)(items)  # pyright: ignore[reportCallIssue]
            kept = all(get(made, key) is value for key, value in items.items())
    if kept:
        return made
    if all(map(operator.is_, leaves(batch), leaves(list(items.values())))):
        return batch
    raise TypeError(
        f"a {type(batch).__name__} in a batch cannot be copied with other tensors, as is needed to move, convert or "
        f"divide it ({reason}): use a dict, a tuple or a dataclass"
    )


def _set_in_copy(
    batch: Any,
    items: dict[Any, Any],
    get: Callable[..., Any],
    put: Callable[..., None],
) -> Any:
    copied = copy.copy(batch)
    if copied is batch:
        raise TypeError("its copy is itself")
    if not isinstance(batch, (dict, list)) and not hasattr(batch, "__copy__"):
        for name, value in list(getattr(copied, "__dict__", {}).items()):
            # It may keep its values there, and the copy must not share them.
            if isinstance(value, (dict, list)):
                object.__setattr__(copied, name, copy.copy(value))
    for key, value in items.items():
        if get(copied, key) is not value:
            put(copied, key, value)
    return copied


def move_items(batch: Any, move: Callable[[Any], Any]) -> Any:
    """Apply ``move`` to tensors, and to what has a ``to`` method, except for a mapping without a device of its own."""
    if isinstance(batch, Tensor):
        return move(batch)
    if callable(getattr(batch, "to", None)) and (
        not isinstance(batch, Mapping) or hasattr(type(batch), "device")
    ):
        try:
            moved = move(batch)
            # Some move in place, and give nothing back.
            return batch if moved is None else moved
        except TypeError:
            if children(batch) is None:
                raise
            # A container whose method takes other arguments is moved value by value.
    return rebuild(batch, partial(move_items, move=move))


def cast_batch(batch: Any, dtype: torch.dtype) -> Any:
    """Convert all floating-point tensors to ``dtype``; objects that are no containers stay as they are."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, PackedSequence):
        return batch.to(dtype) if batch.data.is_floating_point() else batch
    return rebuild(batch, partial(cast_batch, dtype=dtype))


def batch_size_of(batch: Any) -> int:
    """The first dimension of the batch's tensors; without any, the ``batch_size`` of what it holds, such as graphs.

    Raises:
        ValueError: if they differ, or there is none.
    """
    sizes = set()
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            sizes.add(leaf.shape[0])
        elif isinstance(leaf, PackedSequence):
            sizes.add(int(leaf.batch_sizes[0]))
    if not sizes:
        reported = [getattr(leaf, "batch_size", None) for leaf in leaves(batch)]
        sizes = {size for size in reported if isinstance(size, int)}
    if len(sizes) == 1:
        return sizes.pop()
    if sizes:
        raise ValueError(f"this batch has first dimensions {sorted(sizes)}")
    raise ValueError(
        f"this batch has no tensor with a dimension (it is a {type(batch).__name__})"
    )


def slice_batch(
    batch: Any,
    start: int,
    stop: int,
    whole: int,
) -> Any:
    """Samples ``start`` to ``stop`` of ``whole``: of tensors, arrays and lists with one entry for each sample.

    Raises:
        TypeError: for an object that holds tensors out of reach.
    """
    if isinstance(batch, Tensor) or type(batch).__module__ == "numpy":
        return batch[start:stop] if batch.ndim and len(batch) == whole else batch
    may_be_samples = (
        isinstance(batch, (tuple, *LISTS))
        and len(batch) == whole
        and not hasattr(batch, "_fields")
    )
    # A list of tensors is one of columns, each with a row for every sample; any other list may be one of samples.
    if may_be_samples and not any(
        isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves(batch)
    ):
        # A deque has no slices.
        samples = list(batch) if isinstance(batch, deque) else batch
        return samples[start:stop]
    if children(batch) is None and callable(getattr(batch, "to", None)):
        raise TypeError(
            f"micro_batch: a batch can be divided if it is made of tensors, lists, tuples, dicts and dataclasses; got "
            f"a {type(batch).__name__}"
        )
    return rebuild(batch, partial(slice_batch, start=start, stop=stop, whole=whole))
