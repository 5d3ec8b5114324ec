"""Where the processes of a job meet, and how they leave: torch's store and process group, owned by one object."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .environment import ClusterEnvironment
from .handshake import name_attempt

# In seconds; a process that waits for what another one writes looks at least so often.
_LONGEST_PAUSE = 0.2


class Rendezvous:
    """The store in which this process meets the others, and the process group that is made there.

    A process has one, :data:`RENDEZVOUS`, as torch has one default process group. Several strategies may use that
    group, at a time and one after the other.

    Attributes:
        before_leaving: functions to call while the process group is still there.
    """

    def __init__(self) -> None:
        self.before_leaving: list[Callable[[], None]] = []
        # It is kept when a group ends: the next group's processes must not meet in another store.
        self._store: Store | None = None
        # Who uses the process group that we have made: the last one to leave destroys it. It is not left to garbage
        # collection, which happens at different moments in different processes.
        self._members: set[Any] = set()
        # Referenced until the group is destroyed: were the last reference dropped by a thread of gloo's while the
        # interpreter ends, the process would abort.
        self._last_barrier: Any = None
        # For each name, how often next_number was called.
        self._numbers: Counter[str] = Counter()

    def store(self, environment: ClusterEnvironment, timeout: timedelta) -> Store:
        """Return the store in which the processes find each other. It serves all groups, and what needs no group."""
        if self._store is None:
            variables = {
                "MASTER_ADDR": environment.address,
                "MASTER_PORT": environment.port,
                "RANK": environment.rank,
                "LOCAL_RANK": environment.local_rank,
                "LOCAL_WORLD_SIZE": environment.local_world_size,
                "NODE_RANK": environment.node_rank,
                "WORLD_SIZE": environment.world_size,
            }
            os.environ.update({name: str(variables[name]) for name in variables})
            store, *_ = next(rendezvous("env://", timeout=timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                own = PrefixStore("loopwright", store)
                rank = environment.rank
                world_size = environment.world_size
                attempt = name_attempt(own, rank, world_size, timeout)
                store = PrefixStore(f"loopwright/{attempt}", store)
            self._store = store
            atexit.register(self.leave_job)
        return self._store

    def group_store(self, name: str) -> Store:
        """Return a new part of the process group's store, on a connection of its own.

        Args:
            name: for what it is; all processes ask with the same names in the same order.
        """
        return PrefixStore(f"{name}/{self.next_number(name)}", _store_of_group())

    def side_store(self, name: str, timeout: timedelta) -> Store | None:
        """Return a part of the process group's store for a thread beside the run; None if there is no group.

        Args:
            name: of the part.
            timeout: how long a call waits.
        """
        if not dist.is_initialized():
            return None
        store = _store_of_group()
        store.set_timeout(timeout)
        return PrefixStore(name, store)

    def next_number(self, name: str) -> int:
        """Return 1, 2, … for each name: a number for what all processes do in the same order, so that they agree."""
        self._numbers[name] += 1
        return self._numbers[name]

    def join(
        self,
        member: Any,
        environment: ClusterEnvironment | None,
        backend: str,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """Join torch's process group, which is made if there is none.

        Args:
            member: who joins.
            environment: what a launcher told this process; None makes a group for this process alone.
            backend: of the group.
            timeout: how long the group's collectives wait.
        """
        if dist.is_initialized():
            # A group that somebody else has made has no members here, so nobody who leaves destroys it.
            if self._members:
                self._members.add(member)
            return
        store: Any = getattr(dist, "HashStore")()  # noqa: B009 # torch documents it, and does not declare it
        rank = 0
        world_size = 1
        if environment is not None:
            rank = environment.rank
            world_size = environment.world_size
            # Each group has a part of the store for itself, as what the last group wrote there is no longer true.
            number = self.next_number("group")
            store = PrefixStore(
                f"loopwright/{number}", self.store(environment, timeout)
            )
        # The functions of this module take as a default the group that there is at its import, and keep it alive. Now
        # there is none.
        import_module("torch.distributed.nn.functional")
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size
        )
        self._members = {member}

    def leave_group(self, member: Any) -> None:
        """Leave the process group; the last member that leaves it ends it."""
        if member in self._members:
            self._members.remove(member)
            if not self._members:
                self.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all processes of torch's process group."""
        self._last_barrier = dist.barrier(async_op=True)
        self._last_barrier.wait()

    def destroy_process_group(self) -> None:
        """Destroy the process group, with gloo's threads, which would abort the process at the interpreter's end."""
        for function in list(self.before_leaving):
            function()
        self._last_barrier = None
        # What is left of a run, such as the traceback of its error, may hold DDP, which holds the group.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        # DeepSpeed keeps groups for its next engine.
        deepspeed_groups = sys.modules.get("deepspeed.utils.groups")
        if deepspeed_groups is not None:
            deepspeed_groups._release_process_group_references()

    def leave_job(self) -> None:
        """Destroy the process group for good, and the store too."""
        self.destroy_process_group()
        self._store = None


def _store_of_group() -> Any:
    """Return the process group's store, on a connection of its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def comes(store: Any, key: str, is_gone: Callable[[], bool]) -> bool:
    """Wait for what another process writes into a store.

    Args:
        store: of torch.
        key: what is to come.
        is_gone: whether that process is known to have ended.

    Returns:
        Whether it came, before the process had ended and within the store's time-out.
    """
    until = time.monotonic() + store.timeout.total_seconds()
    pause = 1e-3
    while not store.check([key]):
        if is_gone() or time.monotonic() > until:
            # It may have been the last that the process did.
            return store.check([key])
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


@contextmanager
def timing_out(timeout: timedelta) -> Iterator[None]:
    """Return a context in which new process groups get this time-out: libraries that make some do not ask for it.

    Args:
        timeout: how long the groups' collectives wait.
    """
    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    yield
    for group in set(groups) - before:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


RENDEZVOUS = Rendezvous()
