"""How to tell that memory ran out, and how to free some."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .engine import Engine

# What stands in the RuntimeErrors of libraries that have no class for it.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_not_supported",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory was not enough."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in _SIGNS
    )


def free_memory(device: torch.device) -> None:
    """Collect garbage, and give the device's memory that is no longer used back."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.memory.empty_cache()


@contextmanager
def leaving_together(engine: Engine) -> Iterator[None]:
    """Raise in all processes if memory runs out within the block in one of them. A collective at its end.

    Within it, processes must not meet: one that ran out of memory would not come.

    Raises:
        torch.OutOfMemoryError: if it did; it holds nothing of what was computed.
    """
    failure = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The error itself holds the frames of what has run, and so its memory.
        failure = str(error) or "out of memory"
    failed = bool(failure)
    if engine.num_processes > 1:
        failed = bool(engine.reduce(torch.tensor(int(failed)), "max").item())
    if failed:
        raise torch.OutOfMemoryError(failure or "out of memory in another process")
