"""The device that is measured; without CUDA the CPU, on which the code is only rehearsed."""

from __future__ import annotations

import gc
import sys

import torch

IS_REHEARSAL = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if IS_REHEARSAL else "cuda:0")


def wait() -> None:
    """Let the device do all that it was given. A host–device sync."""
    if not IS_REHEARSAL:
        torch.cuda.synchronize()


def begin_peak() -> None:
    """Count the device's memory at its highest from here on."""
    if not IS_REHEARSAL:
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most bytes that tensors have held on the device since `begin_peak`; 0 in a rehearsal."""
    return 0 if IS_REHEARSAL else torch.cuda.max_memory_allocated()


def tidy() -> None:
    """Leave nothing of one contender to the next: neither memory nor compiled code."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if not IS_REHEARSAL:
        torch.cuda.empty_cache()


def about() -> str:
    """The device, in words."""
    if IS_REHEARSAL:
        return "a CPU: a rehearsal of the code, whose figures mean nothing"
    properties = torch.cuda.get_device_properties(DEVICE)
    gigabytes = properties.total_memory / 2**30
    return (
        f"{properties.name}, {gigabytes:.0f} GiB; CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )
