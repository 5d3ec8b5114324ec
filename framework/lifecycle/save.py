"""What goes into a checkpoint of a run, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...strategies.optimizer_state import name_states, number_states
from ...strategies.tensor_shards import full_state
from ..checkpoint.saver import Save
from ..checkpoint.serialization import State
from ..datamodule import DataModule
from ..errors import gather_outcomes
from ..loop import weight_sets
from ..metrics.values import as_floats
from ..seed import rng_state
from ..subclasses import overrides

if TYPE_CHECKING:
    from ..loop.run import Run


def can_save_alone(run: Run) -> bool:
    """Whether this process can write a checkpoint without the others: it has all that resuming cannot do without."""
    if not run.trainer.is_global_zero or run.engine.strategy.capabilities.shards_state:
        return False
    if run.trainer.world_size == 1 or run.live_step is None:
        return True
    # The state of a loader that keeps one differs between processes.
    position = run.loaders.train_state(run.progress()["batch_idx"])
    state = None if position is None else position["loader"]
    states = state if isinstance(state, list) else [state]
    return not any(states)


def save_run(
    run: Run,
    path: str,
    weights_only: bool,
    wait: bool = True,
    on_complete: Callable[[], None] | None = None,
    together: bool = True,
    save_format: str | None = None,
) -> Save:
    """Write a checkpoint of the run as it stands; a collective, unless the main rank saves alone.

    Args:
        run: the run.
        path: the directory or file to make, local or any fsspec URL.
        weights_only: leave out all that only resuming needs.
        wait: until it is complete, without a copy of the tensors.
        on_complete: called on the main rank when it is complete, in the thread that writes.
        together: all ranks call this; else the main one does alone.
        save_format: ``"folder"``, ``"file"`` or None for the Trainer's.

    Raises:
        ValueError: if ``save_format`` is none of these.
        RuntimeError: after an exception, where each rank has a part of the state only.
        OSError: if a hook of the user's raised it on any rank; on all ranks.
    """
    if together:
        for check in run.trainer.checkpoints.before_save.values():
            check()
    _require_whole_state(run)
    save_format = save_format or run.trainer.save_format
    require_save_format(save_format)
    note = run.record.begin_save(run)

    def complete() -> None:
        note(path)
        if on_complete is not None:
            on_complete()

    with weight_sets.saving(run), run.record.phase("checkpoint"):
        return _save(run, path, weights_only, wait, complete, together, save_format)


def _save(
    run: Run,
    path: str,
    weights_only: bool,
    wait: bool,
    on_complete: Callable[[], None] | None,
    together: bool,
    save_format: str,
) -> Save:
    """:func:`save_run`, when the module has the weights that are trained."""
    checkpoint: State = {}
    of_this_rank: State = {}
    failed = None
    try:
        checkpoint = collect(run, weights_only, save_format == "file")
        if not weights_only:
            of_this_rank = {"rng": rng_state(run.engine.device), **run.gathered()}
    except OSError as error:
        # A hook of the user's may raise it on this rank alone, so the others are told below. Any other error ends this
        # process, and with it the others.
        failed = error
    by_rank = [of_this_rank]
    if together:
        outcome = gather_outcomes(run.engine.strategy, path, failed, of_this_rank)
        by_rank, failed = outcome
    if failed is not None:
        raise failed
    rng = None
    if not weights_only:
        if not together:
            _warn_incomplete(run)
        rng = [states["rng"] for states in by_rank]
        checkpoint["loader_states"] = [[states["loader"]] for states in by_rank]
        checkpoint["run"]["logged"] = [states["logged"] for states in by_rank]
        checkpoint["run"]["saved_by"] = by_rank[0]["saved_by"]
    return run.engine.saver.save(
        run.engine.strategy,
        checkpoint,
        path,
        _facts(run, checkpoint),
        rng,
        wait,
        on_complete,
        not together,
        save_format,
    )


def require_save_format(save_format: str) -> None:
    """Raise a ValueError for a format that there is not."""
    if save_format not in ("folder", "file"):
        raise ValueError(
            f'save_format must be "folder" or "file", or None for the Trainer\'s; got {save_format!r}'
        )


def _require_whole_state(run: Run) -> None:
    """Raise after an exception where this rank cannot have the whole state, and so cannot save alone."""
    strategy = run.engine.strategy
    is_sharded = strategy.capabilities.shards_state and run.trainer.world_size > 1
    if strategy.group.failed and is_sharded:
        raise RuntimeError(
            f"no checkpoint can be saved after an exception under strategy={strategy.name!r}: each process has a part "
            "of the state only, and the others may be gone"
        )


def _warn_incomplete(run: Run) -> None:
    """Say what a checkpoint lacks that the main rank saves alone."""
    run.engine.warn_incomplete(
        "save_checkpoint",
        "the random states of the others and what they have logged in this epoch",
        "all that resume take the main one's random state",
    )


def _facts(run: Run, checkpoint: State) -> State:
    """What the manifest says of the checkpoint."""
    return {
        "epoch": checkpoint["epoch"],
        "global_step": checkpoint["global_step"],
        "precision": run.engine.precision.name,
        "module": type(run.module).__qualname__,
        "metrics": as_floats(run.trainer.callback_metrics),
        "resumable": "optimizer_states" in checkpoint,
        "fit": run.name,
    }


def collect(run: Run, weights_only: bool, whole: bool) -> State:
    """Collect what all ranks have alike of a run's checkpoint, with what the hooks ``on_save_checkpoint`` add to it.

    Args:
        run: the run.
        weights_only: leave out all that only resuming needs.
        whole: put tensors together that are sharded; then this is a collective.
    """
    trainer = run.trainer
    datamodule = run.datamodule
    strategy = run.engine.strategy
    checkpoint: State = {
        "epoch": run.state.epoch,
        "global_step": run.state.global_step,
        "state_dict": strategy.model_state(),
    }
    if other_weights := weight_sets.states(run):
        checkpoint["weight_sets"] = other_weights
    for owner, key in (
        (run.module, "hyper_parameters"),
        (datamodule, "datamodule_hyper_parameters"),
    ):
        if owner is not None and owner.hparams:
            checkpoint[key] = owner.portable_hparams()
            checkpoint[f"{key}_call"] = owner.hparams_call
    if not weights_only:
        checkpoint["callbacks"] = {
            c.state_key: s for c in trainer.callbacks if (s := c.state_dict())
        }
        if run.live_step is not None:
            checkpoint |= run.live_step.state_dict()
        checkpoint["loggers"] = [logger.state_dict() for logger in trainer.loggers]
        checkpoint["record"] = run.record.state_dict()
        checkpoint["run"] = {"state": run.progress()}
        checkpoint["data_seed"] = run.state.seed
        if datamodule is not None and overrides(datamodule, "state_dict", DataModule):
            checkpoint["datamodule"] = datamodule.state_dict()
    if whole and strategy.capabilities.shards_state:
        # In one order on all ranks, which that of a set is not.
        for key in ("state_dict", "weight_sets", "optimizer_states"):
            if key in checkpoint:
                checkpoint[key] = full_state(strategy, checkpoint[key])  # collective
    number_states(checkpoint)
    for hook in run.hooks.on_save_checkpoint:
        hook(checkpoint)
    name_states(checkpoint)
    return checkpoint
