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
    """

    def __init__(self, path: str, strategy: Strategy) -> None:
        self.path = path
        self.strategy = strategy
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write, in another thread."""

        def run() -> None:
            try:
                write()
            except BaseException as error:  # what a logger raises, too
                self._failed = error

        # The interpreter waits for it when it ends, as for other threads, but for a user in a hurry.
        self._thread = threading.Thread(target=run, name="loopwright-checkpoint", daemon=True)
        self._thread.start()
        atexit.register(self.wait)

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
        """Write a checkpoint from the main process. A collective.

        Args:
            strategy: knows the processes.
            checkpoint: what to save, as of :class:`~.checkpoint.Snapshot`.
            path: the directory to make.
            facts: JSON values for the manifest.
            rng: each process's random generators, by rank.
            wait: until it is complete; otherwise only until its tensors are copied, and for the save before.
            then: called in the main process when it is complete, before the next one begins.

        Raises:
            OSError: if it could not be written; in all processes.
        """
        about = {"created": time.time(), "world_size": strategy.world_size, "strategy": strategy.name, **facts}
        save = Save(path, strategy)

        def begin() -> None:
            snapshot = Snapshot(checkpoint, about, rng, copy=not wait)

            def write() -> None:
                snapshot.write(path)
                if then is not None:
                    then()

            write() if wait else save.start(write)

        self.wait()
        in_main_process(strategy, path, begin)
        self._last = save
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
