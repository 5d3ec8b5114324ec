"""Save a checkpoint when an exception ends the training."""

from __future__ import annotations

import os
from logging import getLogger
from typing import TYPE_CHECKING

from .base import Callback
from .checkpoint_names import absolute

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class OnExceptionCheckpoint(Callback):
    """Save a checkpoint when an exception ends the training, to look into or to go on from.

    It holds the run as the exception left it. The position in the data is the start of the accumulation window that was
    not completed, while random generators have moved on; an exception inside an optimizer's step may leave half of the
    weights updated. With several processes, the main one saves without the others, so values that were logged for the
    epoch's means are those of the main process only. To go on exactly, resume from a checkpoint of
    :class:`~loopwright.callbacks.ModelCheckpoint`.

    Nothing is saved for a signal that asks to end if a ``ModelCheckpoint`` has saved already, nor for a second Ctrl-C.

    Args:
        dirpath: where to save, a path or an fsspec URL.
        filename: name without extension. One that is there is replaced.

    Raises:
        ValueError: if ``filename`` is empty.
    """

    phase = "persist"
    FILE_EXTENSION = ".ckpt"

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        filename: str = "on_exception",
    ) -> None:
        if not filename:
            raise ValueError("The filename cannot be empty")
        self.dirpath = absolute(os.fspath(dirpath))
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint goes."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: Module,
        exception: BaseException,
    ) -> None:
        if trainer.state.fn != "fit" or trainer.run.live_step is None:
            return
        if trainer.must_end_at_once or not trainer.is_global_zero:
            return
        if trainer.consensus.saved_for_signal:
            return
        if trainer.strategy.capabilities.shards_state and trainer.world_size > 1:
            log.warning(
                "%s: no process has all of the state, nothing is saved",
                type(exception).__name__,
            )
            return
        trainer.save_checkpoint(self.ckpt_path)
        log.warning("%s: saved %s", type(exception).__name__, self.ckpt_path)
