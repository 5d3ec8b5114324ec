"""Tensors and lists among processes: put together, padded, and divided."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import LISTS, children, map_tensors, move_batch, rebuild

if TYPE_CHECKING:
    from ...strategies.base import Strategy


def rebuild_alike(data: Any, function: Callable[[Any], Any]) -> Any:
    """As :func:`rebuild`; goes through a mapping in an order that does not depend on that of its keys."""
    if not isinstance(data, Mapping):
        return rebuild(data, function)
    made = {key: function(data[key]) for key in sorted(data.keys(), key=repr)}
    values = iter([made[key] for key in data.keys()])  # noqa: SIM118 # some mappings are iterated by their rows
    return rebuild(data, lambda _: next(values))


def keys_of(data: Any) -> Any:
    """The keys of all mappings in ``data``, each where it is; None if there is no mapping."""
    if isinstance(data, Mapping):
        return {repr(key): keys_of(value) for key, value in data.items()}
    inside = list(map(keys_of, children(data) or ()))
    return inside if any(keys is not None for keys in inside) else None


def map_values(data: Any, function: Callable[[Any], Any], call: str) -> Any:
    """Copy containers, with ``function`` applied to all tensors and Python numbers.

    Raises:
        TypeError: for anything else but None; it names the call.
    """
    if isinstance(data, (Tensor, Number)):
        return function(data)
    if data is None or children(data) is not None:
        return rebuild_alike(data, partial(map_values, function=function, call=call))
    raise TypeError(
        f"{call} takes tensors and numbers, alone or in dicts, lists, tuples and dataclasses; got a "
        f"{type(data).__name__}: gather_object takes anything"
    )


def as_tensor(value: Any) -> Tensor:
    """A tensor, or a Python number as one without a dimension, of full precision."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(
        value, dtype=torch.float64 if isinstance(value, float) else None
    )


def reduce(strategy: Strategy, value: Any, reduction: str, scale: float) -> Any:
    """A tensor or number reduced over all processes, of the kind that it was."""
    if isinstance(value, Tensor):
        reduced: Any = (
            value if reduction == "none" else strategy.reduce(value, reduction)
        )
    elif reduction == "none":
        reduced = value
    else:
        number = as_tensor(value * 1.0 if reduction == "mean" else +value)
        reduced = strategy.reduce(number, reduction).item()
    return reduced if scale == 1.0 else reduced * scale


def concatenate(strategy: Strategy, value: Any) -> Tensor:
    """The tensors or numbers of all processes, one after the other; numbers become one dimension."""
    tensor = as_tensor(value)
    tensor = tensor[None] if tensor.dim() == 0 else tensor
    return (
        strategy.all_gather(tensor).flatten(0, 1) if strategy.world_size > 1 else tensor
    )


def concatenate_uneven(strategy: Strategy, tensor: Tensor, present: bool) -> Tensor:
    """As :func:`concatenate`, of tensors with different first dimensions; one that is not ``present`` is left out.

    Raises:
        RuntimeError: if they differ in their types or in other dimensions.
    """
    tensor = tensor[None] if tensor.dim() == 0 else tensor
    if strategy.world_size == 1:
        return tensor
    # Where types or shapes differ, gloo ends the process, and others give wrong numbers.
    kind = zlib.crc32(outline(tensor).encode())
    told = strategy.all_gather(
        torch.tensor([len(tensor) if present else 0, kind])
    ).tolist()
    if any(other != kind for _, other in told):
        require_alike(strategy.gather_objects(outline(tensor)))
    sizes = [size for size, _ in told]
    longest = max(sizes)
    rows = tensor[:longest] if present else tensor[:0]
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    return torch.cat(
        [own[:size] for own, size in zip(strategy.all_gather(rows), sizes, strict=True)]
    )


def outline(tensor: Tensor) -> str:
    """What must be alike of tensors that are put together."""
    return f"{tensor.dtype}{['n', *tensor.shape[1:]]}"


def require_alike(outlines: list[Any], call: str = "gather_for_metrics") -> None:
    """Refuse results that cannot be put together.

    Raises:
        RuntimeError: if they differ, with each process's.
    """
    if any(outline != outlines[0] for outline in outlines):
        lines = [f"  rank {rank}: {outline}" for rank, outline in enumerate(outlines)]
        raise RuntimeError(
            f"{call}: the processes have different results:\n" + "\n".join(lines) + "\n"
            "Rows of different lengths can be made equal before: pad_across_processes(tensor, dim=1)"
        )


def pad(
    strategy: Strategy, tensor: Tensor, dim: int, value: Any, first: bool
) -> Tensor:
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


def exchange(strategy: Strategy, value: Any) -> list[Any]:
    """The values of all processes, by rank: anything that can be pickled; tensors come to each one's device."""
    if strategy.world_size == 1:
        return [value]
    with suppress(
        Exception
    ):  # containers and tensors that cannot be copied are pickled as they are
        value = map_tensors(value, _portable)
    return move_batch(strategy.gather_objects(value), strategy.device)


def _portable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    # Pickle would take the whole memory that a view such as a row shares.
    return (
        tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    )


def join(values: list[Any]) -> list[Any]:
    """The items of all processes' lists, by rank; what is no list or tuple is an item itself."""
    return [
        item
        for own in values
        for item in (own if isinstance(own, (tuple, *LISTS)) else [own])
    ]


def split(inputs: Any, rank: int, world_size: int, padding: bool) -> Any:
    """Process ``rank``'s consecutive part of a list, tuple, tensor, mapping or dataclass of such, or dataset.

    Raises:
        ValueError: for a mapping whose values have different lengths.
        TypeError: for what cannot be divided.
    """
    if world_size == 1:
        return inputs
    length = _length(inputs)
    size, more = divmod(length, world_size)
    start = rank * size + min(rank, more)
    return _part(
        inputs, start, start + size + (rank < more), size + bool(more) if padding else 0
    )


def _length(inputs: Any) -> int:
    if _has_columns(inputs):
        lengths = [_length(value) for value in children(inputs) or ()]
        if len(set(lengths)) > 1:
            told = (
                dict(zip(inputs.keys(), lengths, strict=True))
                if isinstance(inputs, Mapping)
                else lengths
            )
            raise ValueError(
                f"the values of a {type(inputs).__name__} must have one length to be divided; got {told}"
            )
        return lengths[0] if lengths else 0
    if (
        isinstance(inputs, str)
        or not hasattr(inputs, "__len__")
        or not hasattr(inputs, "__getitem__")
    ):
        raise TypeError(
            f"inputs must be a list, tuple, tensor, dict of such, or dataset; got {type(inputs).__name__}"
        )
    return len(inputs)


def _has_columns(inputs: Any) -> bool:
    """Whether the values are divided, and not the container: of mappings, named tuples and dataclasses."""
    return children(inputs) is not None and (
        not isinstance(inputs, (tuple, *LISTS)) or hasattr(inputs, "_fields")
    )


def _part(inputs: Any, start: int, stop: int, at_least: int) -> Any:
    if _has_columns(inputs):
        return rebuild(
            inputs, partial(_part, start=start, stop=stop, at_least=at_least)
        )
    if isinstance(
        inputs, (deque, range)
    ):  # one has no slices, and the other takes no padding
        inputs = list(inputs)
    if not isinstance(inputs, (Sequence, Tensor)):
        kind = getattr(inputs, "select", None)  # a dataset of Hugging Face's
        stop = max(stop, start + min(at_least, len(inputs)))
        indices = [min(i, len(inputs) - 1) for i in range(start, stop)]
        if type(inputs).__module__ == "numpy":
            return inputs[indices]
        return (
            kind(indices)
            if kind is not None
            else torch.utils.data.Subset(inputs, indices)
        )
    part: Any = inputs[start:stop]
    missing = at_least - len(part)
    if missing <= 0 or not len(inputs):
        return part
    last: Any = part[-1:] if len(part) else inputs[-1:]
    if isinstance(part, Tensor):
        return torch.cat([part, last.expand(missing, *last.shape[1:])])
    return part + last * missing
