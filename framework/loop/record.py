"""What the loop tells of a run to whoever keeps a record of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...callbacks.base import Callback
    from ..trainer import Trainer
    from .run import Run, RunRequest


class NoRecord:
    """Keeps nothing: each method says when it is called, and what a record does then.

    Attributes:
        folder: where the record lies; None if there is none.
        is_replay: whether the program is run again to look at a step of an earlier run, and so saves nothing.
    """

    folder: str | None = None
    is_replay = False

    def take_up(self, trainer: Trainer, request: RunRequest) -> RunRequest:
        """A run was asked for; return the one to do."""
        return request

    def heard(self, callbacks: list[Callback]) -> list[Callback]:
        """Return those callbacks of a run whose hooks are to be called."""
        return callbacks

    def begin(self, run: Run, number: int) -> None:
        """A run begins, of a fit with its number in the program.

        All ranks know the folders of the loggers, and the checkpoint's counters have been applied, if there is one.
        """

    def begin_training(self, run: Run) -> None:
        """Optimizers and loaders are there, and the loop puts its own work among the hooks next."""

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an epoch are about to be trained on; return an iterator that gives the same."""
        return batches

    def timed_transfer(
        self, transfer: Callable[[Any, int], Any] | None
    ) -> Callable[[Any, int], Any] | None:
        """Batches go through this function on their way to the device; return one that does the same."""
        return transfer

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Something that is not a step begins: ``"validation"``, ``"checkpoint"`` or ``"other"``; a context for it."""
        return nullcontext()

    def begin_row(self, run: Run) -> None:
        """The values of a step are written to the loggers next, on all ranks."""

    def add_row(self, step: int, values: dict[str, Any]) -> None:
        """A row was written to the loggers of the main rank; ``values`` has the epoch, too."""

    def end_row(self, run: Run) -> None:
        """The values of a step were written to the loggers, if there were any, on all ranks."""

    def add_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        """An image or the like was given to the loggers of the main rank."""

    def begin_save(self, run: Run) -> Callable[[str], None]:
        """A checkpoint is to be saved; return what the main rank calls with its path when it is complete."""
        return _ignore

    def note_removed(self, path: str) -> None:
        """A checkpoint was removed, as better or newer ones are kept."""

    def end_epoch(self, run: Run, values: dict[str, Any]) -> None:
        """An epoch has ended, complete or not, and its values were logged."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the record; None for nothing. The main rank's counts."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The run goes on from a checkpoint; also called in the middle of a run that goes back to one."""

    def take(self, folder: str | None) -> None:
        """The run was one of another process, and has left its record there."""

    def end(self, run: Run, error: BaseException | None = None) -> None:
        """The run is over: normally, or by an exception."""


def _ignore(path: str) -> None:
    """Do nothing."""
