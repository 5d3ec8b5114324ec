"""Batches of any nesting: finding and moving their tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to all tensors in dicts, lists, tuples, named tuples and dataclasses; the rest stays.

    An object with a ``to`` method (a ``PackedSequence``, a tokenizer's encoding) counts as a tensor.
    """
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, function) for key, value in batch.items()}
        return like_mapping(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch) if field.init]
        return replace(batch, **{name: map_tensors(getattr(batch, name), function) for name in names})
    return batch


def like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """``items`` as a mapping of the batch's own kind."""
    if isinstance(batch, defaultdict):
        return type(batch)(batch.default_factory, items)
    return items if type(batch) is dict else type(batch)(items)  # pyright: ignore[reportCallIssue] # as mappings do


def move_batch(batch: Any, device: torch.device) -> Any:
    """Move all tensors to ``device``; on CUDA on a stream of their own, so that the copy overlaps the step before."""
    if device.type != "cuda":
        return map_tensors(batch, lambda tensor: tensor.to(device))
    current = torch.cuda.current_stream(device)
    stream = _copy_stream(device)

    def move(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):  # its tensors are out of reach for record_stream
            with torch.cuda.stream(current):
                return tensor.to(device)
        moved = tensor.to(device, non_blocking=True)
        moved.record_stream(current)  # its memory is reused only after the step that reads it
        return moved

    with torch.cuda.stream(stream):
        moved = map_tensors(batch, move)
    current.wait_stream(stream)
    return moved


_copy_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def cast_batch(batch: Any, dtype: torch.dtype) -> Any:
    """Convert all floating-point tensors to ``dtype``."""

    def cast(tensor: Any) -> Any:
        return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor

    return map_tensors(batch, cast)


def batch_size_of(batch: Any, name: str = "") -> int:
    """The first dimension of the batch's tensors.

    Raises:
        ValueError: if they differ, or there is none; it names the value that was to be logged.
    """
    sizes: list[int] = []

    def note(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.dim():
            sizes.append(tensor.shape[0])
        return tensor

    map_tensors(batch, note)
    if len(set(sizes)) == 1:
        return sizes[0]
    found = f"first dimensions {sorted(set(sizes))}" if sizes else "no tensor with a dimension"
    raise ValueError(
        f"log({name!r}): an epoch's mean is weighted by batch size, and this batch has {found}; "
        "pass batch_size=… to log"
    )
