"""Checkpoints on their way to disk: written by the main process, in a thread of its own while the training goes on."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checkpoint import Snapshot

if TYPE_CHECKING:
    from ..strategies import Strategy


class Save:
    """A checkpoint that is being written; the processes beside the main one have it too, to hear how it went.

    Attributes:
        path: where to.
        written: whether the checkpoint is complete; known to all processes after :meth:`finish`.
    """

    def __init__(self, path: str, strategy: Strategy) -> None:
        self.path = path
        self.strategy = strategy
        self.written = False
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def write(self, snapshot: Snapshot, then: Callable[[], None] | None) -> None:
        """Write, and keep what goes wrong for :meth:`finish`."""
        try:
            snapshot.write(self.path)
            self.written = True
            if then is not None:
                then()
        except BaseException as error:  # what a logger raises, too
            self._failed = error

    def start(self, snapshot: Snapshot, then: Callable[[], None] | None) -> None:
        """Write, in another thread."""
        # The interpreter waits for it when it ends, as for other threads, but for a user in a hurry.
        self._thread = threading.Thread(
            target=self.write, args=(snapshot, then), name="loopwright-checkpoint", daemon=True
        )
        self._thread.start()
        atexit.register(self.wait)

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
        atexit.unregister(self.wait)

    def finish(self) -> None:
        """Wait until the checkpoint is complete. A collective.

        Raises:
            OSError: if it could not be written; in all processes.
        """
        self.wait()
        if not self.strategy.failed:  # else the others are in another collective, or gone
            self.written = self.strategy.broadcast(self.written)
        tell(self.strategy, self.path, self._failed)


class Saver:
    """Writes checkpoints one after the other."""

    def __init__(self) -> None:
        self._last: Save | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}  # a copy has nothing under way

    def save(
        self,
        strategy: Strategy,
        checkpoint: dict[str, Any],
        path: str,
        facts: dict[str, Any],
        rng: list[Any] | None,
        wait: bool = True,
        then: Callable[[], None] | None = None,
    ) -> Save:
        """Let the main process write a checkpoint.

        Args:
            strategy: knows the processes.
            checkpoint: what to save, as of :class:`~.checkpoint.Snapshot`.
            path: the directory to make.
            facts: JSON values for the manifest.
            rng: each process's random generators, by rank.
            wait: write now; otherwise only copy the tensors now, after the save before is done.
            then: called in the main process when it is complete, before the next one begins.

        Returns:
            What tells how it went, when its ``finish()`` is called; in all processes.
        """
        self.wait()
        self._last = save = Save(path, strategy)
        if not strategy.is_global_zero:
            return save
        about = {"created": time.time(), "world_size": strategy.world_size, "strategy": strategy.name, **facts}
        try:
            snapshot = Snapshot(checkpoint, about, rng, copy=not wait)
        except Exception as error:
            save.fail(error)
            return save
        save.write(snapshot, then) if wait else save.start(snapshot, then)
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


def in_main_process(strategy: Strategy, path: str, write: Callable[[], Any]) -> None:
    """Let the main process write ``path``; if that fails, it fails in all of them. A collective."""
    failed: Exception | None = None
    if strategy.is_global_zero:
        try:
            write()
        except Exception as error:
            failed = error
    tell(strategy, path, failed)


def tell(strategy: Strategy, path: str, failed: BaseException | None) -> None:
    """Let all processes know what the main one's attempt to write ``path`` raised, if anything. A collective.

    Raises:
        BaseException: in the main process, ``failed``; in the others, an OSError that tells of it.
    """
    told = None
    if not strategy.failed:  # else the others are in another collective, or gone
        told = strategy.broadcast(failed and f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    if told is not None:
        raise OSError(f"rank 0 could not save {path!r}: {told}")
