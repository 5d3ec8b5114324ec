"""Accelerate's functions for memory that runs short."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...engine import batch_size
from ...engine.out_of_memory import free_memory, is_out_of_memory


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give the device's memory that is no longer used back."""
    if garbage_collection:
        gc.collect()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        free_memory(accelerator)


def release_memory(*objects: Any) -> list[Any]:
    """Collect garbage; returns None for each object, to be assigned to its name."""
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Whether an error says that memory was not enough."""
    return is_out_of_memory(exception)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """Decorate a function to be called again with a smaller batch size when memory runs out.

    Args:
        function: takes the batch size as its first argument.
        starting_batch_size: of the first call.
        reduce_batch_size_fn: called without an argument, gives the next size (default: 0.9 times the last one).
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    reduce = _reduction(reduce_batch_size_fn)
    return batch_size.find_executable_batch_size(function, starting_batch_size, reduce)


def _reduction(function: Callable[..., int] | None) -> Callable[[int], int]:
    if function is None:
        return lambda size: int(size * 0.9)
    if inspect.signature(function).parameters:
        return function
    return lambda size: function()
