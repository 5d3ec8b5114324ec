"""How the processes of one attempt meet in a store that outlives them, and so holds what earlier attempts have written.

torchrun's agents keep one store for all attempts of a job. There, gloo would read the addresses of processes that are
gone. Numbering the attempts is not enough, as agents on several machines count them differently. So the processes agree
on a name for their attempt, each of them having seen that the others live.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# How often a process looks whether it has been answered, in seconds.
_PAUSE = 0.01


def name_attempt(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that all processes of this attempt agree on, and that no earlier attempt had. A collective.

    Each process says hello with a word that it has just drawn. Rank 0 answers all of them with these words and a name.
    Who finds its own word in its answer takes the name, and says so; when all have, rank 0 tells them to go. A hello of
    an earlier attempt is replaced sooner or later, and then rank 0 answers again, with another name.

    Args:
        store: of torch, on which all processes look.
        rank: this process's.
        world_size: number of processes.
        timeout: how long to wait for the others.

    Raises:
        DistStoreError: if not all of them come in time.
    """
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    looks = _looks(timeout, rank)
    if rank == 0:
        return _answer(store, world_size, looks)
    return _wait_for_answer(store, rank, word, looks)


def _answer(store: Any, world_size: int, looks: Iterator[None]) -> str:
    """Rank 0's part."""
    ranks = range(world_size)
    answered: list[bytes] = []
    name = ""
    for _ in looks:
        # This waits for all.
        words = store.multi_get([f"hello/{rank}" for rank in ranks])
        if words != answered:
            answered = words
            name = uuid.uuid4().hex
            answers = [f"{word.decode()} {name}" for word in words]
            store.multi_set([f"answer/{rank}" for rank in ranks], answers)
        if store.add(f"taken/{name}", 0) == world_size - 1:
            break
    store.set(f"go/{name}", "")
    return name


def _wait_for_answer(store: Any, rank: int, word: str, looks: Iterator[None]) -> str:
    """The other ranks' part."""
    taken = ""
    for _ in looks:
        of_word, _, name = store.get(f"answer/{rank}").decode().partition(" ")
        if of_word != word:
            continue
        if name != taken:
            taken = name
            store.add(f"taken/{name}", 1)
        if store.check([f"go/{name}"]):
            break
    return taken


def _looks(timeout: timedelta, rank: int) -> Iterator[None]:
    """Return moments to look at the store, until it is too late."""
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        yield
        time.sleep(_PAUSE)
    raise dist.DistStoreError(
        f"rank {rank} has not met the other processes of this attempt within {timeout}"
    )
