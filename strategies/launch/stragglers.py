"""Which process is slower than the others, so that they wait for it: told once, as it costs all of them time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

# Looks at a run, after which the processes compare: about a minute.
WINDOW = 60
# A process counts as slower if it waits in so much smaller a part of the looks than more than half of the others.
_DIFFERENCE = 0.3

log = logging.getLogger("loopwright")


class Stragglers:
    """Compares how often the processes of a job are seen waiting for others.

    A process waits where its innermost Python function is one of a collective or of the backward pass, which hides
    collectives and work of its own alike. So shares are compared, and what is slow inside a backward pass is not seen.

    Args:
        rank: this process's.
        world_size: number of processes of the job.
        open_store: returns a store of torch that all processes share, for the calling thread alone; None if there is
            none yet.
    """

    def __init__(
        self, rank: int, world_size: int, open_store: Callable[[], Any]
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._open_store = open_store
        self._store: Any = None
        self._is_off = world_size == 1
        self._looks = 0
        self._waiting = 0
        self._number = 0
        self._place = ""
        self._compared: list[bytes] = [b""] * world_size
        self._told: set[int] = set()

    def note(self, place: str, waits: bool) -> None:
        """Note a look at this process while it trains.

        Args:
            place: of its run, in words.
            waits: whether it may be waiting for others.
        """
        if self._is_off:
            return
        self._looks += 1
        if waits:
            self._waiting += 1
        else:
            self._place = place
        if self._looks == WINDOW:
            try:
                self._compare()
            except RuntimeError:
                # The store has gone, as at the end of a job.
                self._is_off = True

    def _compare(self) -> None:
        """Tell the others of the last looks; rank 0 compares when all have."""
        share = self._waiting / self._looks
        self._looks = self._waiting = 0
        self._number += 1
        if self._store is None:
            self._store = self._open_store()
        store = self._store
        if store is None:
            return
        told = json.dumps([self._number, share, self._place])
        store.set(f"waits/{self.rank}", told)
        keys = [f"waits/{rank}" for rank in range(self.world_size)]
        if self.rank != 0 or not store.check(keys):
            return
        newest = store.multi_get(keys)
        if any(new == old for new, old in zip(newest, self._compared, strict=True)):
            return
        self._compared = newest
        _, shares, places = zip(*map(json.loads, newest), strict=True)
        self._tell(shares, places)

    def _tell(self, shares: tuple[float, ...], places: tuple[str, ...]) -> None:
        slowest = min(range(self.world_size), key=lambda rank: shares[rank])
        least = shares[slowest] + _DIFFERENCE
        waiting = sorted(share for share in shares if share >= least)
        is_waited_for = 2 * len(waiting) > self.world_size - 1
        if not is_waited_for or slowest in self._told:
            return
        self._told.add(slowest)
        log.warning(
            "Rank %d of %d is slower than the others: in the last %d looks at each, one a second at most, they were "
            "waiting in at least %.0f %%, it in %.0f %%; it was last seen at work at %s",
            slowest,
            self.world_size,
            WINDOW,
            100 * waiting[0],
            100 * shares[slowest],
            places[slowest],
        )
