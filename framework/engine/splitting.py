"""Inputs that are divided among the processes, such as prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import LISTS, children, rebuild


def split(inputs: Any, rank: int, world_size: int, padding: bool) -> Any:
    """Return a process's consecutive part of ``inputs``.

    Args:
        inputs: a list, tuple, tensor or dataset, or a mapping or dataclass of such.
        rank: of the process.
        world_size: number of processes; the first ones have one item more if it does not divide the length.
        padding: repeat the last item, so that all processes have as many.

    Raises:
        ValueError: for a mapping whose values have different lengths.
        TypeError: for what cannot be divided.
    """
    if world_size == 1:
        return inputs
    size, remainder = divmod(_length(inputs), world_size)
    start = rank * size + min(rank, remainder)
    stop = start + size
    if rank < remainder:
        stop += 1
    largest_size = size + 1 if remainder else size
    return _slice(inputs, start, stop, at_least=largest_size if padding else 0)


def _length(inputs: Any) -> int:
    if _has_columns(inputs):
        lengths: Any = [_length(column) for column in children(inputs) or ()]
        if len(set(lengths)) <= 1:
            return lengths[0] if lengths else 0
        if isinstance(inputs, Mapping):
            lengths = dict(zip(inputs.keys(), lengths, strict=True))
        raise ValueError(
            f"the values of a {type(inputs).__name__} must have one length to be divided; got {lengths}"
        )
    has_items = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
    if isinstance(inputs, str) or not has_items:
        raise TypeError(
            f"inputs must be a list, tuple, tensor, dict of such, or dataset; got {type(inputs).__name__}"
        )
    return len(inputs)


def _has_columns(inputs: Any) -> bool:
    """Whether the values are divided, and not the container: of mappings, named tuples and dataclasses."""
    if isinstance(inputs, (tuple, *LISTS)):
        return hasattr(inputs, "_fields") and children(inputs) is not None
    return children(inputs) is not None


def _slice(inputs: Any, start: int, stop: int, at_least: int) -> Any:
    """Return the items from ``start`` up to ``stop``, the last one repeated until there are ``at_least`` so many."""
    if _has_columns(inputs):
        slice_column = partial(_slice, start=start, stop=stop, at_least=at_least)
        return rebuild(inputs, slice_column)
    # A deque has no slices, and a range takes no padding.
    if isinstance(inputs, (deque, range)):
        inputs = list(inputs)
    if not isinstance(inputs, (Sequence, Tensor)):
        return _select(inputs, start, max(stop, start + min(at_least, len(inputs))))
    part: Any = inputs[start:stop]
    num_missing = at_least - len(part)
    if num_missing <= 0 or len(inputs) == 0:
        return part
    last: Any = part[-1:] if len(part) > 0 else inputs[-1:]
    if isinstance(part, Tensor):
        return torch.cat([part, last.expand(num_missing, *last.shape[1:])])
    return part + last * num_missing


def _select(dataset: Any, start: int, stop: int) -> Any:
    """Return items of an array or a dataset; beyond its end, the last one again."""
    last = len(dataset) - 1
    indices = [min(index, last) for index in range(start, stop)]
    if type(dataset).__module__ == "numpy":
        return dataset[indices]
    # A dataset of Hugging Face's.
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    return torch.utils.data.Subset(dataset, indices)
