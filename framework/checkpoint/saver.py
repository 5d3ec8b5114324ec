"""Checkpoints on their way to disk: written by the main process, in a thread of its own while the training goes on."""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import gather_outcomes
from ..messages import log
from .writer import Snapshot

if TYPE_CHECKING:
    from ...strategies import Strategy


class Peers:
    """How processes that each write a part of a checkpoint hear of each other, while the training goes on.

    They do so through the store in which they met, from the threads that write: no collective.
    """

    def __init__(self, strategy: Any) -> None:  # one whose processes have met
        self.rank, self.world_size = strategy.global_rank, strategy.world_size
        self.store = strategy.group.store("checkpoint")

    def target(self) -> str:
        """The folder that the main process has chosen."""
        return self._answer("target")

    def hand_in(self, write: Callable[[], dict[str, Any]]) -> None:
        """Write this process's files, and tell the main one which they are, or what went wrong."""
        try:
            files = write()
        except Exception as error:
            self.give_up(error)
            raise
        self._tell(str(self.rank), files)

    def gather(
        self, target: str, write: Callable[[str], dict[str, Any]]
    ) -> dict[str, Any]:
        """In the main process: let all write into ``target``; returns what they have, when they are done.

        Raises:
            OSError: if one of them failed.
        """
        self._tell("target", target)
        failed: Exception | None = None
        files: dict[str, Any] = {}
        for rank in range(self.world_size):
            try:
                files |= write(target) if rank == 0 else self._answer(str(rank))
            except Exception as error:  # the others still write there
                failed = failed or error
        if failed is not None:
            raise failed
        return files

    def give_up(self, error: Exception) -> None:
        """Let nobody wait for this process."""
        self._tell(
            "target" if self.rank == 0 else str(self.rank),
            None,
            f"rank {self.rank}: {error}",
        )

    def _tell(self, key: str, value: Any, failed: str = "") -> None:
        self.store.set(key, json.dumps([value, failed]))

    def _answer(self, key: str) -> Any:
        value, failed = json.loads(self.store.get(key))
        if failed:
            raise OSError(failed)
        return value


class Save:
    """A checkpoint that is being written; the processes beside the main one have it too, to hear how it went.

    Attributes:
        path: where to.
        alone: the main process saves without the others.
        written: whether the checkpoint is complete; known to all processes after :meth:`finish`.
    """

    def __init__(self, path: str, strategy: Strategy) -> None:
        self.path = path
        self.strategy = strategy
        self.alone = False
        self.written = False
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def write(
        self,
        snapshot: Snapshot,
        on_complete: Callable[[], None] | None,
        peers: Peers | None = None,
    ) -> None:
        """Write, and keep what goes wrong for :meth:`finish`."""
        try:
            snapshot.write(self.path, peers)
            self.written = True
            if on_complete is not None:
                on_complete()
        except BaseException as error:  # what a logger raises, too
            self._failed = error

    def start(
        self,
        snapshot: Snapshot,
        on_complete: Callable[[], None] | None,
        peers: Peers | None = None,
    ) -> None:
        """Write, in another thread."""
        # The interpreter waits for it when it ends, as for other threads, but for a user in a hurry.
        self._thread = threading.Thread(
            target=self.write,
            args=(snapshot, on_complete, peers),
            name="loopwright-checkpoint",
            daemon=True,
        )
        self._thread.start()
        atexit.register(self._wait_at_exit)

    def fail(self, error: Exception) -> None:
        """Keep an error from before there was something to write."""
        self._failed = error

    def wait(self) -> None:
        """Wait until this process has nothing more to do for it, whether it went well or not."""
        if self._thread is not None:
            self._thread.join()
            self.abandon()

    def abandon(self) -> None:
        """Wait for it no longer."""
        self._thread = None
        atexit.unregister(self._wait_at_exit)

    def _wait_at_exit(self) -> None:
        self.wait()
        if self._failed is not None:  # and nobody has asked
            log.error("%s", self._failed)

    def finish(self) -> None:
        """Wait until the checkpoint is complete. A collective, unless the main process saves alone.

        Raises:
            OSError: if it could not be written; in all processes.
        """
        self.wait()
        if self.alone:
            if self._failed is not None:
                raise self._failed
            return
        written, failed = gather_outcomes(
            self.strategy, self.path, self._failed, self.written
        )
        self.written = written[0]
        if failed is not None:
            raise failed


class Saver:
    """Writes checkpoints one after the other.

    Attributes:
        created: when the newest checkpoint of this run was made, in seconds since 1970; the next one is later, even
            if the clock has been set back.
    """

    def __init__(self) -> None:
        self.created = 0.0
        self._last: Save | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a copy has nothing under way

    def save(
        self,
        strategy: Strategy,
        checkpoint: dict[str, Any],
        path: str,
        facts: dict[str, Any],
        rng: list[Any] | None,
        wait: bool = True,
        on_complete: Callable[[], None] | None = None,
        alone: bool = False,
    ) -> Save:
        """Let the main process write a checkpoint.

        Args:
            strategy: knows the processes.
            checkpoint: what to save, as of :class:`~.checkpoint.Snapshot`.
            path: the directory to make.
            facts: JSON values for the manifest.
            rng: each process's random generators, by rank.
            wait: write now; otherwise only copy the tensors now, after the save before is done.
            on_complete: called in the main process when it is complete, before the next one begins.
            alone: whether the main process does so without the others.

        Returns:
            What tells how it went, when its ``finish()`` is called; in all processes.
        """
        self.wait()
        self._last = save = Save(path, strategy)
        save.alone = alone
        peers = (
            Peers(strategy)
            if strategy.capabilities.shards_state and strategy.world_size > 1
            else None
        )
        if peers is None and not strategy.is_global_zero:
            return save
        self.created = max(time.time(), self.created + 1e-3)
        about = {
            "created": self.created,
            "world_size": strategy.world_size,
            "strategy": strategy.name,
            **facts,
        }
        try:
            snapshot = Snapshot(
                checkpoint, about, rng, copy=not wait, rank=strategy.global_rank
            )
        except Exception as error:
            save.fail(error)
            if peers is not None:
                peers.give_up(error)
            return save
        on_complete = on_complete if strategy.is_global_zero else None
        save.write(snapshot, on_complete, peers) if wait else save.start(
            snapshot, on_complete, peers
        )
        return save

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one; whoever began it hears how it went."""
        if self._last is not None:
            self._last.wait()
            self._last = None

    def abandon(self) -> None:
        """Wait no longer for the save that is under way: the user is in a hurry, and it stays incomplete."""
        if self._last is not None:
            self._last.abandon()
            self._last = None
