"""How much memory a process has."""

from __future__ import annotations

import re
from contextlib import suppress

import torch

from ....strategies.launch.machine import usable_memory

_UNITS = {
    **{"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    **{"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40},
}


def read_memory(memory: str | int | float) -> int:
    """Return bytes: ``"80GB"`` is 80 · 10⁹, ``"80GiB"`` is 80 · 2³⁰.

    Raises:
        ValueError: for what is no amount of memory.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", str(memory).lower())
    size = 0.0
    if match is not None and not isinstance(memory, bool):
        with suppress(ValueError, KeyError):
            size = float(match[1]) * _UNITS[match[2]]
    if size < 1:
        raise ValueError(
            f'memory must be a number of bytes, or a text such as "80GB" or "24GiB"; got {memory!r}'
        )
    return int(size)


def memory_here(device: torch.device, processes: int) -> int | None:
    """Return the bytes of a device of this machine; of the CPU, the part of one of so many processes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    size = usable_memory()
    if size is None:
        return None
    return size // processes
