"""Accelerate's seeding, and random numbers that are the same in all processes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch

from .options import RNGType
from .state import AcceleratorState, PartialState


def set_seed(
    seed: int, device_specific: bool = False, deterministic: bool = False
) -> None:
    """Seed Python, NumPy and torch on all devices.

    Args:
        seed: the seed.
        device_specific: give each process another one, by its index.
        deterministic: let torch use deterministic algorithms only.
    """
    if device_specific:
        seed += AcceleratorState().process_index
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(
    rng_type: RNGType | None = None, generator: torch.Generator | None = None
) -> None:
    """Give a generator the main process's state, in all processes.

    Args:
        rng_type: torch's generator of the CPU, of an accelerator, or ``generator``.
        generator: one of the program's own.
    """
    state = PartialState()
    if state.num_processes == 1 or rng_type is None:
        return
    if rng_type == RNGType.GENERATOR:
        if generator is None:
            return
        generator.set_state(_of_main_process(generator.get_state()))
    elif rng_type == RNGType.TORCH:
        torch.set_rng_state(_of_main_process(torch.get_rng_state()))
    elif rng_type.value == state.device.type:
        module = torch.get_device_module(state.device)
        module.set_rng_state(_of_main_process(module.get_rng_state()))
    else:
        raise ValueError(
            f"rng_types={rng_type.value!r}: the processes compute on {state.device.type!r}"
        )


def _of_main_process(value: torch.Tensor) -> torch.Tensor:
    return PartialState().engine.broadcast(value).cpu()


def synchronize_rng_states(
    rng_types: Iterable[Any], generator: torch.Generator | None = None
) -> None:
    """Give several generators the main process's states, in all processes; see :func:`synchronize_rng_state`."""
    for rng_type in rng_types:
        synchronize_rng_state(RNGType(str(rng_type)), generator)
