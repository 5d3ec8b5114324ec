"""Lightning's functions about random numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...seed import SEED_VARIABLE, isolated_rng
from ...seed import seed_everything as seed_natively

__all__ = [
    "isolate_rng",
    "max_seed_value",
    "min_seed_value",
    "pl_worker_init_function",
    "reset_seed",
    "seed_everything",
]

log = logging.getLogger("loopwright")

min_seed_value = 0
max_seed_value = 2**32 - 1
_SEED = "PL_GLOBAL_SEED"
_WORKERS = "PL_SEED_WORKERS"

isolate_rng = isolated_rng


def seed_everything(
    seed: int | None = None, workers: bool = False, verbose: bool = True
) -> int:
    """Seed Python, NumPy (if it is imported) and torch on all devices.

    Args:
        seed: from 0 to 2**32 - 1; by default that of the environment's ``PL_GLOBAL_SEED`` or ``LOOPWRIGHT_SEED``,
            else 0.
        workers: noted in ``PL_SEED_WORKERS``; DataLoader workers are always seeded.
        verbose: log the seed.

    Returns:
        The seed.

    Raises:
        ValueError: if the seed is no integer in this range.
    """
    if seed is None and _SEED in os.environ:
        text = os.environ[_SEED]
        if not text.lstrip("-").isdecimal():
            raise ValueError(f"Invalid seed specified via {_SEED}: {text!r}")
        seed = int(text)
    if seed is not None:
        seed = int(seed)
        if not min_seed_value <= seed <= max_seed_value:
            raise ValueError(
                f"{seed} is not in bounds, which are {min_seed_value} and {max_seed_value}"
            )
    was_there = SEED_VARIABLE in os.environ
    number = seed_natively(seed, verbose=False)
    if not was_there:
        # Lightning's programs check that they leave no variables behind but those that they know.
        del os.environ[SEED_VARIABLE]
    if verbose and os.environ.get("RANK", "0") == "0":
        log.info("Seed set to %d", number)
    os.environ[_SEED] = str(number)
    os.environ[_WORKERS] = str(int(workers))
    return number


@contextmanager
def seed_is_known() -> Iterator[None]:
    """Let what describes a run find the seed, inside a ``with`` block."""
    if _SEED not in os.environ or SEED_VARIABLE in os.environ:
        yield
        return
    os.environ[SEED_VARIABLE] = os.environ[_SEED]
    try:
        yield
    finally:
        os.environ.pop(SEED_VARIABLE, None)


def reset_seed() -> None:
    """Seed everything as the last :func:`seed_everything` did; nothing without one."""
    if _SEED not in os.environ:
        return
    workers = os.environ.get(_WORKERS, "0") == "1"
    seed_everything(int(os.environ[_SEED]), workers, verbose=False)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Does nothing: a DataLoader's workers are seeded anyway, by batch.

    Args:
        worker_id: of the worker.
        rank: of the process.
    """
