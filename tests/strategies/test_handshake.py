"""Processes of one attempt find each other where earlier attempts have left their words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from loopwright.strategies.launch.handshake import name_attempt

LIMIT = timedelta(seconds=30)


@pytest.fixture
def store() -> Any:
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT)


def names(store: Any, world_size: int, order: list[int]) -> list[str]:
    """What each rank takes for the attempt's name; they come in this order, each when the one before is at work."""

    def meet(rank: int) -> str:
        return name_attempt(store.clone(), rank, world_size, LIMIT)

    with ThreadPoolExecutor(world_size) as pool:
        futures = {}
        for rank in order:
            seen = store.get(f"hello/{rank}") if store.check([f"hello/{rank}"]) else b""
            futures[rank] = pool.submit(meet, rank)
            while not store.check([f"hello/{rank}"]) or (
                store.get(f"hello/{rank}") == seen
            ):
                continue
        return [futures[rank].result() for rank in range(world_size)]


def test_an_attempt_has_a_name_of_its_own(store: Any) -> None:
    """Also with the words of a process that is gone, with fewer and with more processes than before."""
    attempts = [
        names(store, 2, [0, 1]),
        # Rank 0 answers what rank 1 of the attempt before has said.
        names(store, 2, [0, 1]),
        names(store, 2, [1, 0]),
        names(store, 1, [0]),
        names(store, 3, [0, 2, 1]),
    ]
    for attempt in attempts:
        assert len(set(attempt)) == 1
    assert len({attempt[0] for attempt in attempts}) == len(attempts)


def test_who_meets_nobody_gives_up(store: Any) -> None:
    store.set("answer/1", "another name")
    with pytest.raises(dist.DistStoreError, match="rank 1 has not met the other"):
        name_attempt(store, 1, 2, timedelta(seconds=0.1))
