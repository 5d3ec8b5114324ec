"""How a run goes on from a checkpoint: what of it is applied when."""

from __future__ import annotations

import json
import reprlib
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ...strategies.optimizer_state import name_states, number_states
from ..checkpoint.serialization import State, encode, require_loaded
from ..errors import CheckpointError
from ..from_checkpoint import load_weights, with_weight_set
from ..loop import weight_sets
from ..loop.resume import ResumeEpoch
from ..messages import log
from ..metrics.metric_state import merge_metric_states
from ..metrics.values import merge_logged
from ..subclasses import overrides

if TYPE_CHECKING:
    from ..loop.run import Run


class Resume(ResumeEpoch):
    """Applies a checkpoint, each part of it at the moment that :class:`~..loop.resume.NoResume` tells.

    Args:
        run: the run.
        checkpoint: what was read.
    """

    is_from_checkpoint = True

    def __init__(self, run: Run, checkpoint: State) -> None:
        super().__init__(run, None)
        self._checkpoint = checkpoint

    def apply_counters(self) -> None:
        """Set the counters and the seed of the data's order, and let the loggers go on where they were."""
        run = self.run
        checkpoint = self._checkpoint
        if "run" in checkpoint:
            run.state.load_state_dict(checkpoint["run"]["state"])
        run.engine.saver.go_on_after(checkpoint["manifest"])
        # The main rank alone writes.
        loggers = run.trainer.loggers if run.trainer.is_global_zero else []
        states = checkpoint.get("loggers", [])
        for logger, state in zip(loggers, states, strict=False):
            logger.load_state_dict(state)
        run.record.load_state_dict(checkpoint.get("record"))

    def apply_weights(self) -> None:
        """Call the hooks for loading, and set weights, and the states of data and callbacks."""
        run = self.run
        checkpoint = self._checkpoint
        module = run.module
        datamodule = run.datamodule
        name = weight_sets.evaluated_name(run.trainer)
        if run.fn != "fit" and name is not None:
            if name in checkpoint.get("weight_sets", {}):
                weights = with_weight_set(checkpoint, name, run.ckpt_path)
                checkpoint["state_dict"] = weights
            else:
                run.warn_once(
                    "The checkpoint holds no weights %r: this runs on those that were trained",
                    name,
                )
        # Hooks get the optimizers' states as torch has them.
        number_states(checkpoint)
        module.on_load_checkpoint(checkpoint)
        load_weights(
            run.engine.strategy.load_model_state,
            module,
            checkpoint,
            run.ckpt_path,
            module.strict_loading,
        )
        if datamodule is not None and "datamodule" in checkpoint:
            require_loaded(checkpoint["datamodule"])
            datamodule.load_state_dict(checkpoint["datamodule"])
        for callback in run.trainer.callbacks:
            if overrides(callback, "on_load_checkpoint", Callback):
                callback.on_load_checkpoint(run.trainer, module, checkpoint)
        name_states(checkpoint)
        if run.fn == "fit":
            self._load_callbacks(checkpoint.get("callbacks", {}))
        else:
            # An evaluation must not set back what a fit has found, such as the best checkpoints. It needs no more.
            self._checkpoint = {}

    def _load_callbacks(self, states: State) -> None:
        """Give callbacks their states, and warn of states that none of them takes."""
        run = self.run
        for callback in run.trainer.callbacks:
            if callback.state_key in states:
                require_loaded(states[callback.state_key])
                callback.load_state_dict(states[callback.state_key])
        known = {callback.state_key for callback in run.trainer.callbacks}
        if absent := sorted(set(states) - known):
            log.warning(
                "The checkpoint holds states of callbacks that this Trainer lacks: %s",
                ", ".join(absent),
            )

    def apply_optimizers(self) -> None:
        """Set optimizers, schedulers and counters.

        Raises:
            CheckpointError: if the checkpoint holds no run, or one of other optimizers or schedulers.
        """
        run = self.run
        checkpoint = self._checkpoint
        if "run" not in checkpoint or "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"checkpoint {run.ckpt_path!r} was saved with weights_only=True, or without a fit: it cannot resume "
                "a run; load its weights with Module.load_from_checkpoint"
            )
        weight_sets.load(run, checkpoint)
        configured = _options(run)
        try:
            run.step.load_state_dict(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {run.ckpt_path!r} does not fit this run: {error}"
            ) from error
        if run.trainer.is_global_zero:
            _tell_what_changed(run, checkpoint, configured)
        run.state.load_state_dict(checkpoint["run"]["state"])
        accumulate = run.state.accumulate_grad_batches
        if accumulate not in (None, run.trainer.accumulate_grad_batches):
            log.info(
                "accumulate_grad_batches is %d, as it was set in the run that is resumed",
                accumulate,
            )
            run.trainer.accumulate_grad_batches = accumulate
        self._gathered = _of_this_rank(run, checkpoint)
        if run.ckpt_path not in run.checkpoints:
            run.note_checkpoint(str(run.ckpt_path), is_own=False)
        # It holds all weights once more, and nothing needs them any longer.
        self._checkpoint = {}
        log.info(
            "Resuming from %s: epoch %d, step %d",
            run.ckpt_path,
            run.state.epoch,
            run.state.global_step,
        )


def _options(run: Run) -> State:
    """The options of all optimizers' parameter groups, such as the learning rate."""
    groups = [
        group
        for optimizer in run.trainer.optimizers
        for group in optimizer.param_groups
    ]
    return {
        f"{name} of parameter group {number}": value
        for number, group in enumerate(groups)
        for name, value in group.items()
        if name not in ("params", "initial_lr")
    }


def _tell_what_changed(
    run: Run,
    checkpoint: State,
    configured: State,
) -> None:
    """Warn of hyperparameters that differ from the checkpoint's, and name the options that stay as they were saved."""
    changed = []
    for owner, key in (
        (run.module, "hyper_parameters"),
        (run.datamodule, "datamodule_hyper_parameters"),
    ):
        saved = checkpoint.get(key)
        if not saved or not isinstance(saved, dict):
            continue
        now = {} if owner is None else owner.portable_hparams()
        for name in {**saved, **now}:
            was = saved.get(name)
            is_now = now.get(name)
            if _written(was) != _written(is_now):
                changed.append(
                    f"{name} was {reprlib.repr(was)} and is {reprlib.repr(is_now)}"
                )
    if not changed:
        return
    options = _options(run)
    kept = [
        f"{name} = {value}"
        for name, value in options.items()
        if repr(value) != repr(configured.get(name))
    ]
    log.warning(
        "Resuming with other hyperparameters than the checkpoint's: %s. The module and the loggers have the new ones; "
        "optimizers and schedulers go on with the checkpoint's%s",
        ", ".join(changed),
        f" ({', '.join(kept)})" if kept else "",
    )


def _written(value: Any) -> str:
    """Write a hyperparameter as a checkpoint does: then two not-a-numbers are equal, too."""
    plain = json.loads(
        json.dumps(encode(value, "", {}, {}), default=repr),
        object_hook=_as_loaded,
    )
    return json.dumps(plain, sort_keys=True)


def _as_loaded(written: State) -> Any:
    """Leave out the class of a value, which a checkpoint restores only where pickled objects are loaded."""
    items = written.get("$items")
    if items and all(isinstance(key, str) for key, _ in items):
        return dict(items)
    return written.get("$plain", written.get("$value", written))


def _of_this_rank(run: Run, checkpoint: State) -> State:
    """Pick this rank's random generators, loader position and logged values out of those of all ranks.

    With another number of ranks, the main one goes on with all that has been logged in the running epoch, and the
    others with nothing.
    """
    rank = run.trainer.global_rank
    world_size = checkpoint["manifest"]["world_size"]
    logged = checkpoint["run"]["logged"]
    rng = checkpoint["rng"]
    loaders = [states[0] for states in checkpoint["loader_states"]]
    of_this_rank = {"rng": rng[rank % len(rng)] if rng else None}
    # What the main rank saved alone holds its own values only, whatever the number of ranks.
    if world_size == run.trainer.world_size == len(logged):
        return {
            **of_this_rank,
            "loader": loaders[rank],
            "logged": logged[rank],
            "saved_by": checkpoint["run"]["saved_by"],
        }
    is_main = rank == 0
    metrics = [each["metrics"] for each in logged]
    states = [each["metric_states"] for each in logged]
    return {
        **of_this_rank,
        # The ranks read in turn, so the last one has read furthest: the state of its loader counts.
        "loader": {**loaders[0], "loader": loaders[-1]["loader"]},
        "logged": {
            "metrics": merge_logged(metrics, is_main),
            "metric_states": merge_metric_states(run.module, states, is_main),
        },
        "saved_by": world_size,
    }
