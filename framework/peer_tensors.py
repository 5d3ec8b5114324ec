"""Tensors and lists among processes: put together, padded, and divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..strategies.base import Strategy


def is_tensors(data: Any) -> bool:
    """Whether ``data`` is made of tensors only."""
    if isinstance(data, Tensor):
        return True
    if isinstance(data, dict):
        return all(map(is_tensors, data.values()))
    return isinstance(data, (list, tuple)) and bool(data) and all(map(is_tensors, data))


def concatenate(strategy: Strategy, tensor: Tensor) -> Tensor:
    """The tensors of all processes, one after the other; numbers become one dimension."""
    tensor = tensor[None] if tensor.dim() == 0 else tensor
    return strategy.all_gather(tensor).flatten(0, 1) if strategy.world_size > 1 else tensor


def concatenate_uneven(strategy: Strategy, tensor: Tensor, present: bool) -> Tensor:
    """As :func:`concatenate`, of tensors with different first dimensions; one that is not ``present`` is left out."""
    tensor = tensor[None] if tensor.dim() == 0 else tensor
    if strategy.world_size == 1:
        return tensor
    sizes = strategy.all_gather(torch.tensor(len(tensor) if present else 0)).tolist()
    longest = max(sizes)
    rows = tensor[:longest] if present else tensor[:0]
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    return torch.cat([own[:size] for own, size in zip(strategy.all_gather(rows), sizes, strict=True)])


def pad(strategy: Strategy, tensor: Tensor, dim: int, value: Any, first: bool) -> Tensor:
    """A tensor padded along ``dim`` to the largest size of all processes."""
    if dim >= tensor.dim() or dim < -tensor.dim():
        return tensor
    size = int(strategy.reduce(torch.tensor(tensor.shape[dim]), "max").item())
    if size == tensor.shape[dim]:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    padding = tensor.new_full(shape, value)
    return torch.cat([padding, tensor] if first else [tensor, padding], dim)


def flatten(found: list[Any]) -> list[Any]:
    """The items of all processes' lists; what is no list is an item itself."""
    return [item for own in found for item in (own if isinstance(own, (list, tuple)) else [own])]


def split(inputs: Any, rank: int, world_size: int, padding: bool) -> Any:
    """Process ``rank``'s consecutive part of a list, tuple, tensor, dict of such, or dataset.

    Raises:
        ValueError: for a dict whose values have different lengths.
        TypeError: for what cannot be divided.
    """
    if world_size == 1:
        return inputs
    length = _length(inputs)
    size, more = divmod(length, world_size)
    start = rank * size + min(rank, more)
    return _part(inputs, start, start + size + (rank < more), size + bool(more) if padding else 0)


def _length(inputs: Any) -> int:
    if isinstance(inputs, dict):
        lengths = {key: _length(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the values of a dict must have one length to be divided; got {lengths}")
        return next(iter(lengths.values()), 0)
    if isinstance(inputs, str) or not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        raise TypeError(f"inputs must be a list, tuple, tensor, dict of such, or dataset; got {type(inputs).__name__}")
    return len(inputs)


def _part(inputs: Any, start: int, stop: int, at_least: int) -> Any:
    if isinstance(inputs, dict):
        return {key: _part(value, start, stop, at_least) for key, value in inputs.items()}
    if not isinstance(inputs, (Sequence, Tensor)):
        kind = getattr(inputs, "select", None)  # a dataset of Hugging Face's
        stop = max(stop, start + min(at_least, len(inputs)))
        indices = [min(i, len(inputs) - 1) for i in range(start, stop)]
        return kind(indices) if kind is not None else torch.utils.data.Subset(inputs, indices)
    part: Any = inputs[start:stop]
    missing = at_least - len(part)
    if missing <= 0 or not len(inputs):
        return part
    last: Any = part[-1:] if len(part) else inputs[-1:]
    if isinstance(part, Tensor):
        return torch.cat([part, last.expand(missing, *last.shape[1:])])
    return part + last * missing
