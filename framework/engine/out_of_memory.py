"""How to tell that memory ran out, and how to free some."""

from __future__ import annotations

import gc

import torch

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
