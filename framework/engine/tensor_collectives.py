"""Collectives of tensors, numbers and containers of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import LISTS, children, map_tensors, rebuild
from ..data.device_input import move_batch

if TYPE_CHECKING:
    from ...strategies.base import Strategy


def rebuild_in_key_order(data: Any, function: Callable[[Any], Any]) -> Any:
    """Copy a container as :func:`rebuild` does; a mapping's values are taken in an order that all processes share."""
    if not isinstance(data, Mapping):
        return rebuild(data, function)
    results = {key: function(data[key]) for key in sorted(data.keys(), key=repr)}
    # Some mappings give their rows, and not their keys, when they are iterated.
    in_own_order = iter([results[key] for key in data.keys()])  # noqa: SIM118
    return rebuild(data, lambda _: next(in_own_order))


def keys_of(data: Any) -> Any:
    """Return the keys of all mappings in ``data``, each where it is; None if there is no mapping."""
    if isinstance(data, Mapping):
        return {repr(key): keys_of(value) for key, value in data.items()}
    keys = [keys_of(value) for value in children(data) or ()]
    has_mapping = any(inner is not None for inner in keys)
    return keys if has_mapping else None


def map_values(data: Any, function: Callable[[Any], Any], call: str) -> Any:
    """Copy containers, with ``function`` applied to all tensors and Python numbers.

    Args:
        data: tensors and numbers, alone or in containers.
        function: takes one of them.
        call: the user's call, for the error.

    Raises:
        TypeError: for anything else but None.
    """
    if isinstance(data, (Tensor, Number)):
        return function(data)
    if data is None or children(data) is not None:
        map_inner = partial(map_values, function=function, call=call)
        return rebuild_in_key_order(data, map_inner)
    raise TypeError(
        f"{call} takes tensors and numbers, alone or in dicts, lists, tuples and dataclasses; got a "
        f"{type(data).__name__}: gather_object takes anything"
    )


def as_tensor(value: Any) -> Tensor:
    """Return a tensor, or a Python number as one of full precision without a dimension."""
    if isinstance(value, Tensor):
        return value
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype)


def reduce(strategy: Strategy, value: Any, reduction: str, scale: float) -> Any:
    """Reduce a tensor or number over all processes; the result is of the same kind.

    Args:
        strategy: the processes.
        value: a tensor, of the same shape in all processes, or a number.
        reduction: as of ``Strategy.reduce``, or "none".
        scale: what to multiply the result with.
    """
    if reduction == "none":
        reduced = value
    elif isinstance(value, Tensor):
        reduced = strategy.reduce(value, reduction)
    else:
        # A plus sign makes an integer of a boolean, as the sum of two booleans is one.
        number = value * 1.0 if reduction == "mean" else +value
        reduced = strategy.reduce(as_tensor(number), reduction).item()
    return reduced if scale == 1.0 else reduced * scale


def concatenate(strategy: Strategy, value: Any) -> Tensor:
    """Return the tensors or numbers of all processes, one after the other; numbers become one dimension."""
    tensor = torch.atleast_1d(as_tensor(value))
    if strategy.world_size == 1:
        return tensor
    return strategy.all_gather(tensor).flatten(0, 1)


def concatenate_uneven(strategy: Strategy, tensor: Tensor, present: bool) -> Tensor:
    """Concatenate tensors with different first dimensions.

    Args:
        strategy: the processes.
        tensor: this process's.
        present: whether it counts; one that does not is left out.

    Raises:
        RuntimeError: if they differ in their types or in other dimensions.
    """
    tensor = torch.atleast_1d(tensor)
    if strategy.world_size == 1:
        return tensor
    # Where types or shapes differ, gloo would end the process, and other backends would give wrong numbers.
    checksum = zlib.crc32(outline(tensor).encode())
    length = len(tensor) if present else 0
    by_rank = strategy.all_gather(torch.tensor([length, checksum])).tolist()
    if any(other != checksum for _, other in by_rank):
        require_alike(strategy.gather_objects(outline(tensor)))
    lengths = [length for length, _ in by_rank]
    rows = tensor[:length]
    num_missing = max(lengths) - length
    if num_missing > 0:
        padding = tensor.new_zeros((num_missing, *tensor.shape[1:]))
        rows = torch.cat([rows, padding])
    gathered = strategy.all_gather(rows)
    return torch.cat(
        [rows[:length] for rows, length in zip(gathered, lengths, strict=True)]
    )


def outline(tensor: Tensor) -> str:
    """Return what must be alike of tensors that are put together: their type, and their dimensions but the first."""
    return f"{tensor.dtype}{['n', *tensor.shape[1:]]}"


def require_alike(by_rank: list[Any], call: str = "gather_for_metrics") -> None:
    """Refuse results that cannot be put together.

    Args:
        by_rank: the outline of each process's result.
        call: the user's call, for the error.

    Raises:
        RuntimeError: if they differ, with each process's.
    """
    if any(other != by_rank[0] for other in by_rank):
        lines = [f"  rank {rank}: {other}" for rank, other in enumerate(by_rank)]
        raise RuntimeError(
            f"{call}: the processes have different results:\n" + "\n".join(lines) + "\n"
            "Rows of different lengths can be made equal before: pad_across_processes(tensor, dim=1)"
        )


def pad(
    strategy: Strategy,
    tensor: Tensor,
    dim: int,
    value: Any,
    first: bool,
) -> Tensor:
    """Pad a tensor to the largest size of all processes.

    Args:
        strategy: the processes.
        tensor: this process's; one without the dimension is returned as it is.
        dim: the dimension to pad.
        value: of the padding.
        first: put the padding in front.
    """
    if dim >= tensor.dim() or dim < -tensor.dim():
        return tensor
    size = tensor.shape[dim]
    largest = int(strategy.reduce(torch.tensor(size), "max").item())
    if size == largest:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = largest - size
    padding = tensor.new_full(shape, value)
    return torch.cat([padding, tensor] if first else [tensor, padding], dim)


def exchange(strategy: Strategy, value: Any) -> list[Any]:
    """Return the values of all processes, by rank: anything that can be pickled; tensors come to this one's device."""
    if strategy.world_size == 1:
        return [value]
    # What cannot be copied, such as a container of an unusual class, is pickled as it is.
    with suppress(Exception):
        value = map_tensors(value, _portable)
    return move_batch(strategy.gather_objects(value), strategy.device)


def _portable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    # Pickle would take the whole memory that a view such as a row shares.
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_part else tensor


def join(by_rank: list[Any]) -> list[Any]:
    """Return the items of all processes' lists and tuples, by rank; anything else is an item itself."""
    items: list[Any] = []
    for value in by_rank:
        if isinstance(value, (tuple, *LISTS)):
            items += value
        else:
            items.append(value)
    return items
