"""To which checkpoint a fit goes back, and what is taken back with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from ..checkpoint.find import is_pointer, resolve
from ..checkpoint.serialization import State
from ..checkpoint.storage import join, storage_of
from ..checkpoint.writer import set_aside, write_pointer
from ..errors import CheckpointError
from ..loop.rewind import Rewind
from ..messages import log
from .find import read_first
from .resume import Resume

if TYPE_CHECKING:
    from ..loop.run import Run


def rewind(run: Run, batches: Iterable[tuple[int, int]]) -> NoReturn:
    """Let a fit go back to its newest checkpoint before the first of these batches. A collective.

    Args:
        run: the fit.
        batches: what to leave out from there on: each batch by its epoch and its index.

    Raises:
        Rewind: for the loop.
        CheckpointError: if there is no such checkpoint.
        RuntimeError: if the training loader cannot be read again.
    """
    batches = sorted(batches)
    _require_rereadable(run)
    # The newest may still be on its way, on any rank.
    run.engine.saver.wait()
    run.engine.strategy.barrier()  # collective
    checkpoint = _read_before(run, batches[0])
    target = str(run.ckpt_path)
    position = run.checkpoints[target].position
    later = [p for p, point in run.checkpoints.items() if point.position > position]
    for path in later:
        if run.checkpoints.pop(path).is_own and run.trainer.is_global_zero:
            _take_back(path, target)
    if run.trainer.is_global_zero:
        for logger in run.trainer.loggers:
            # As between two programs: what it has is written, and the rows after the checkpoint are hidden next.
            logger.finalize("interrupted")
    raise Rewind(Resume(run, checkpoint), batches)


def _require_rereadable(run: Run) -> None:
    """Raise for a training loader that would go on where it is."""
    assert run.loaders.train is not None
    for part in run.loaders.train.source.parts:
        if part.reads_once:
            raise RuntimeError(
                f"the run cannot go back to a checkpoint: {type(part.loader).__name__}, its training loader, can be "
                "read once only, and would go on where it is. Begin the program again with ckpt_path, or give a loader "
                "that can be iterated anew"
            )


def _read_before(run: Run, batch: tuple[int, int]) -> State:
    """Read the newest checkpoint of the fit that goes on with this batch or an earlier one."""
    earlier = {
        path: point
        for path, point in run.checkpoints.items()
        if point.position <= batch
    }
    newest = sorted(earlier, key=lambda path: earlier[path].position, reverse=True)
    for path in newest:
        # What the fit has saved itself, it may load.
        weights_only = False if earlier[path].is_own else run.weights_only
        checkpoint = read_first(run, [path], weights_only)
        if checkpoint is not None:
            return checkpoint
    raise CheckpointError(
        f"the run is to go back to before batch {batch[1]} of epoch {batch[0]}, and of the checkpoints that were saved "
        f"until then {len(newest)} were kept, and none can be read: save more often, and keep more than the newest, as "
        "by ModelCheckpoint(every_n_train_steps=…, save_top_k=-1)"
    )


def _take_back(path: str, target: str) -> None:
    """Set a checkpoint of what the run has not done any more aside; pointers to it name ``target`` instead."""
    folder = path.rpartition("/")[0]
    try:
        for name in storage_of(folder).names(folder):
            pointer = join(folder, name)
            if is_pointer(pointer) and resolve(pointer) == path:
                write_pointer(pointer, target)
        log.warning(
            "%r is of what was taken back; it is kept as %r", path, set_aside(path)
        )
    except OSError as error:
        log.warning("%r is of what was taken back, and stays: %s", path, error)
