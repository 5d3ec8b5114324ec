"""What a callback that saves may do with checkpoints: ``trainer.checkpoints``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..checkpoint.find import is_taken
from ..checkpoint.folder_claims import claim_folder
from ..checkpoint.saver import Save
from ..checkpoint.writer import remove_checkpoint, write_pointer
from ..errors import gather_outcomes
from .save import save_run

if TYPE_CHECKING:
    from ..trainer import Trainer


class RunCheckpoints:
    """The checkpoints of a Trainer's runs, as callbacks save, replace and remove them.

    Args:
        trainer: the Trainer.

    Attributes:
        before_save: by callback, a function that all processes call before each checkpoint that they save together;
            what it raises keeps it from being saved. So a callback that looks at the run now and then looks once more.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.before_save: dict[Any, Callable[[], None]] = {}

    def save(
        self,
        path: str,
        weights_only: bool = False,
        wait: bool = False,
        on_complete: Callable[[], None] | None = None,
        save_format: str | None = None,
    ) -> Save:
        """Write a checkpoint while the training goes on; this waits for the one before, and copies the tensors.

        Args:
            path: the directory or file to make, local or any fsspec URL.
            weights_only: leave out all that only resuming needs.
            wait: until it is complete, without a copy.
            on_complete: called on the main rank when it is complete, in the thread that writes.
            save_format: ``"folder"``, ``"file"``, or None for the Trainer's.

        Returns:
            A handle: its ``finish()``, which all ranks call, waits, and raises what writing raised. Its ``written``
            then says whether the checkpoint is complete, whatever ``on_complete`` raised.
        """
        run = self._trainer.run
        save = save_run(
            run,
            path,
            weights_only,
            wait,
            on_complete,
            save_format=save_format,
        )
        if not weights_only and run.fn == "fit":
            run.note_checkpoint(path, is_own=True)
        return save

    def exists(self, path: str) -> bool:
        """Whether a checkpoint, or anything else that must not be overwritten, is at ``path``."""
        # It may be the one that is still being written.
        self._trainer.engine.saver.wait()
        return is_taken(path)

    def remove(self, path: str, root: str | None = None) -> None:
        """Delete a checkpoint, or a pointer to one; files beside those of the checkpoint stay.

        Args:
            path: the checkpoint.
            root: the folders between this one and the checkpoint go, too, where that leaves them empty.

        Raises:
            CheckpointError: if a directory is there that is no checkpoint.
        """
        remove_checkpoint(path, root)
        self._trainer.record.note_removed(path)

    def point(self, path: str, target: str) -> None:
        """Make ``path`` name the checkpoint ``target``, all at once: a small file, or a link to a local file."""
        write_pointer(path, target)

    def claim_folder(self, path: str) -> str:
        """Make a folder to save in, and keep other runs out of it until this one ends. A collective.

        Returns:
            ``path``, or a folder inside of it if another run has claimed ``path``.

        Raises:
            OSError: if nothing can be written there; on all ranks.
        """
        trainer = self._trainer
        claimed = path
        failure = None
        try:
            if trainer.is_global_zero:
                claimed = claim_folder(path, trainer)
        except Exception as error:
            failure = OSError(
                f"the folder for checkpoints {path!r} cannot be written to: {error}"
            )
        by_rank, failure = gather_outcomes(trainer.strategy, path, failure, claimed)
        if failure is not None:
            raise failure
        return by_rank[0]

    def agree(self, path: str, failure: BaseException | None) -> BaseException | None:
        """Tell all ranks what went wrong on this one while ``path`` was saved, if anything. A collective.

        Returns:
            ``failure``, or an error of the same sort that tells of another rank's, or None.
        """
        return gather_outcomes(self._trainer.strategy, path, failure)[1]
