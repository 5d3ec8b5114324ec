"""When checkpoints are written: one after the other, in a thread of its own while the training goes on."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import gather_outcomes
from ..messages import log
from .serialization import State
from .single_file import FileSnapshot
from .writer import ShardedCommit, Snapshot, commit, commit_file

if TYPE_CHECKING:
    from ...strategies import Strategy


class Save:
    """A checkpoint that is being written. Ranks that write nothing have one, too, to hear how it went.

    Args:
        path: the directory to make.
        strategy: knows the ranks.
        alone: whether the main rank saves without the others.

    Attributes:
        written: whether the checkpoint is complete; known to all ranks after :meth:`finish`.
    """

    def __init__(
        self,
        path: str,
        strategy: Strategy,
        alone: bool,
    ) -> None:
        self.path = path
        self.strategy = strategy
        self.alone = alone
        self.written = False
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def run(self, write: Callable[[], None]) -> None:
        """Call ``write``, and keep what it raises for :meth:`finish`."""
        try:
            write()
        except BaseException as error:
            # Also what a callback raises when the checkpoint is complete.
            self._failed = error

    def fail(self, error: Exception) -> None:
        """Keep an error that came before anything could be written."""
        self._failed = error

    def start(self, write: Callable[[], None]) -> None:
        """:meth:`run`, in another thread."""
        # A daemon, for which the interpreter waits only by `_wait_at_exit`: a user in a hurry can have that left out.
        self._thread = threading.Thread(
            target=self.run,
            args=(write,),
            name="loopwright-checkpoint",
            daemon=True,
        )
        self._thread.start()
        atexit.register(self._wait_at_exit)

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
        if self._failed is not None:
            # Nobody has called `finish`, which would have raised it.
            log.error("%s", self._failed)

    def finish(self) -> None:
        """Wait until the checkpoint is complete. A collective, unless the main rank saves alone.

        Raises:
            OSError: if it could not be written; on all ranks.
        """
        self.wait()
        failed = self._failed
        if not self.alone:
            by_rank, failed = gather_outcomes(
                self.strategy,
                self.path,
                failed,
                self.written,
            )
            self.written = by_rank[0]
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

    def go_on_after(self, manifest: State) -> None:
        """Give the next checkpoint a later time than one that is resumed from."""
        self.created = max(self.created, manifest.get("created", 0.0))

    def __getstate__(self) -> State:
        # A copy, as for another process, has no save under way.
        return {**self.__dict__, "_last": None}

    def save(
        self,
        strategy: Strategy,
        checkpoint: State,
        path: str,
        facts: State,
        rng: list[Any] | None,
        wait: bool = True,
        on_complete: Callable[[], None] | None = None,
        alone: bool = False,
        save_format: str = "folder",
    ) -> Save:
        """Let the main rank write a checkpoint.

        Args:
            strategy: knows the ranks.
            checkpoint: what to save, as of :class:`~.writer.Snapshot`.
            path: the directory or file to make.
            facts: JSON values for the manifest.
            rng: each rank's random generators, by rank.
            wait: write now; otherwise only copy the tensors now, after the save before is done.
            on_complete: called on the main rank when the checkpoint is complete, before the next save begins.
            alone: whether the main rank does so without the others.
            save_format: ``"folder"``, or ``"file"``, for which no tensor may be sharded.

        Returns:
            A handle; its ``finish()`` waits, and raises on every rank what writing raised.
        """
        self.wait()
        save = self._last = Save(path, strategy, alone)
        shared = None
        is_file = save_format == "file"
        if (
            not is_file
            and strategy.capabilities.shards_state
            and strategy.world_size > 1
        ):
            shared = ShardedCommit(strategy)
        elif not strategy.is_global_zero:
            return save
        self.created = max(time.time(), self.created + 1e-3)
        facts = {
            "created": self.created,
            "world_size": strategy.world_size,
            "strategy": strategy.name,
            **facts,
        }
        rank = strategy.global_rank

        def write() -> None:
            if isinstance(snapshot, FileSnapshot):
                commit_file(snapshot.write, path)
            else:
                commit(snapshot, path, shared)
            save.written = True
            if on_complete is not None and rank == 0:
                on_complete()

        try:
            if is_file:
                snapshot = FileSnapshot(checkpoint, facts, rng, copy=not wait)
            else:
                snapshot = Snapshot(checkpoint, facts, rng, not wait, rank)
        except Exception as error:
            if shared is not None:
                shared.give_up(error)
            save.fail(error)
        else:
            save.run(write) if wait else save.start(write)
        return save

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one; only its own ``finish()`` raises what went wrong."""
        if self._last is not None:
            self._last.wait()
            self._last = None

    def abandon(self) -> None:
        """Wait no longer for the save that is under way: the user is in a hurry, and it stays incomplete."""
        if self._last is not None:
            self._last.abandon()
            self._last = None
