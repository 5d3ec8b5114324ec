"""Random numbers: seeding them, and reading and setting the state of all generators."""

from __future__ import annotations

import hashlib
import operator
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..strategies.accelerator import device_rng_state, set_device_rng_state
from ..strategies.launch.environment import AGENT

SEED_VARIABLE = "LOOPWRIGHT_SEED"


def seed_everything(
    seed: int | None = None,
    workers: bool = False,
    verbose: bool = True,
) -> int:
    """Seed Python, NumPy (if it is imported) and torch on all devices.

    Args:
        seed: from 0 to 2**32 - 1; by default that of the environment's ``LOOPWRIGHT_SEED``, else 0.
        workers: accepted for familiarity; DataLoader workers are always seeded, from this seed, by batch.
        verbose: print the seed, once for all processes.

    Returns:
        The seed.

    Raises:
        ValueError: if the seed is no integer in this range.
    """
    value = seed if seed is not None else os.environ.get(SEED_VARIABLE, 0)
    try:
        # A text is that of the environment's variable, or as good as that.
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1; got {value!r}")
    if verbose and AGENT not in os.environ and os.environ.get("RANK", "0") == "0":
        print(f"Seed set to {number}")
    os.environ[SEED_VARIABLE] = str(number)
    _seed_libraries(number)
    torch.manual_seed(number)
    return number


def mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several numbers; any change in any of them gives an unrelated one."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_batch(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator before a batch is made."""
    _seed_libraries(seed)
    # The accelerators' generators belong to the training step.
    torch.default_generator.manual_seed(seed)


def _seed_libraries(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of all generators: Python's, torch's, NumPy's if it is loaded, and that of ``device``."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    device_state = None if device is None else device_rng_state(device)
    if device_state is not None:
        state["device"] = device_state
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Set what :func:`rng_state` returned.

    Args:
        state: the states of the generators, by library.
        device: whose generator is set, too.
    """
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if device is not None and device.type != "cpu" and "device" in state:
        set_device_rng_state(device, state["device"])


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Put all generators back on leaving."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
