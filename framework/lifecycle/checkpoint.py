"""What goes into a checkpoint of a run, and how a run or a module takes it back."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ..checkpoint.find import find_manifests, resolve
from ..checkpoint.manifest import read_manifest
from ..checkpoint.saver import Save
from ..checkpoint.serialization import encode, require_unsealed
from ..checkpoint.storage import exists, is_file, join, list_names
from ..checkpoint.weights import is_weights_file
from ..datamodule import DataModule
from ..engine.checkpoint import read_checkpoint
from ..errors import CheckpointError, gather_outcomes
from ..from_checkpoint import load_weights
from ..messages import log
from ..metrics.metric_state import merge_metric_states
from ..metrics.values import as_floats, merge_logged
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
) -> Save:
    """Write a checkpoint of the run as it stands; with several processes, one writes, and all call this together."""
    strategy = run.engine.strategy
    if (
        strategy.group.failed
        and strategy.capabilities.shards_state
        and run.trainer.world_size > 1
    ):
        raise RuntimeError(
            f"no checkpoint can be saved after an exception under strategy={strategy.name!r}: each process has a part "
            "of the state only, and the others may be gone"
        )
    checkpoint, rng, failed = {}, None, None
    try:
        checkpoint = collect(run, weights_only)
        rng = None if weights_only else rng_state(run.engine.device)
    except OSError as error:  # of a user's hook, in this process alone; other errors end it, and so the others
        failed = error
    peers = (
        together
        and run.trainer.world_size > 1
        and rng is not None
        and not run.engine.strategy.group.failed
    )
    own = run.gathered() if peers and not run.trainer.is_global_zero else None
    told: list[Any] = [(rng, None)]
    if together:
        told, failed = gather_outcomes(run.engine.strategy, path, failed, (rng, own))
    elif not weights_only:
        lacks = (
            "the random states of the others and what they have logged in this epoch"
        )
        run.engine.warn_incomplete(
            "save_checkpoint", lacks, "all that resume take the main one's random state"
        )
    if failed is not None:
        raise failed
    if peers:
        checkpoint["run"]["peers"] = [own for _, own in told[1:]]
    facts = {
        "epoch": checkpoint["epoch"],
        "global_step": checkpoint["global_step"],
        "precision": run.engine.precision.name,
        "module": type(run.module).__qualname__,
        "metrics": as_floats(run.trainer.callback_metrics),
        "resumable": "optimizer_states" in checkpoint,
    }
    generators = None if weights_only else [own for own, _ in told]
    alone = not together
    return run.engine.saver.save(
        run.engine.strategy,
        checkpoint,
        path,
        facts,
        generators,
        wait,
        on_complete,
        alone,
    )


def collect(run: Run, weights_only: bool) -> dict[str, Any]:
    """The checkpoint of a run, as the hooks ``on_save_checkpoint`` see it."""
    module, state = run.module, run.state
    checkpoint: dict[str, Any] = {
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": run.engine.strategy.model_state(),
    }
    for owner, key in (
        (module, "hyper_parameters"),
        (run.datamodule, "datamodule_hyper_parameters"),
    ):
        if owner is not None and owner.hparams:
            checkpoint[key] = owner.portable_hparams()
            checkpoint[f"{key}_call"] = owner.hparams_call
    if not weights_only:
        checkpoint["callbacks"] = {
            c.state_key: s for c in run.trainer.callbacks if (s := c.state_dict())
        }
        if (step := run.live_step) is not None:
            checkpoint.update(step.state_dict())
        checkpoint["loggers"] = [logger.state_dict() for logger in run.trainer.loggers]
        checkpoint["run"] = {"state": run.progress(), **run.gathered()}
        if (datamodule := run.datamodule) is not None and overrides(
            datamodule, "state_dict", DataModule
        ):
            checkpoint["datamodule"] = datamodule.state_dict()
    for hook in run.hooks.on_save_checkpoint:
        hook(checkpoint)
    return checkpoint


def best_checkpoint(run: Run) -> str:
    """The best checkpoint of the first ``ModelCheckpoint``; of an earlier program's, if this one has not fitted."""
    callback = run.trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "")
    if not best and not (
        callback is None or run.trainer.fast_dev_run or run.trainer.last_fit is not None
    ):
        best = run.engine.strategy.broadcast(
            run.trainer.is_global_zero and _best_of_earlier_programs(run, callback)
        )
        if best:
            log.info(
                'ckpt_path="best": this Trainer has not fitted; an earlier run left %s',
                best,
            )
    if not best:
        why = (
            "fast_dev_run saves none"
            if run.trainer.fast_dev_run
            else "no checkpoint was saved as best yet"
        )
        raise ValueError(
            f'ckpt_path="best": {why}; fit with a ModelCheckpoint, or pass a path'
        )
    return best


def _best_of_earlier_programs(run: Run, callback: Any) -> str:
    """The pointer to the best checkpoint in the folder where the newest one lies; of several runs there, the last's."""
    newest = newest_checkpoints(run)
    folder = callback.dirpath or (newest[0].rpartition("/")[0] if newest else "")
    begins = callback.CHECKPOINT_NAME_BEST.partition("{")[0]  # it may hold the epoch
    named = [
        join(folder, name)
        for name in (list_names(folder) if folder and exists(folder) else ())
        if name.startswith(begins) and name.endswith(callback.FILE_EXTENSION)
    ]
    pointers = [path for path in named if is_file(path) and not is_weights_file(path)]
    if pointers:
        return max(
            pointers, key=lambda path: read_manifest(resolve(path)).get("created", 0.0)
        )
    if callback.monitor is None:
        return newest[0] if newest else ""
    # With ``filename="best"``, what is called so is no pointer.
    values = {
        path: read_manifest(path)["metrics"].get(callback.monitor)
        for path in named
        if path in newest
    }
    ranked = {
        path: value
        for path, value in values.items()
        if value is not None and value == value
    }
    choose = max if callback.mode == "max" else min
    return choose(ranked, key=lambda path: ranked[path], default="")


def newest_checkpoints(run: Run) -> list[str]:
    """The complete checkpoints in the folders that the callbacks were given, newest first.

    Of a callback that was given none, in the default ones: those of the loggers, where each run has a folder of its
    own beside those of earlier runs, and of the Trainer; there, only what a module of this class saved.

    Raises:
        CheckpointError: if a fit is to resume, and all that were found hold no run.
    """
    given = {
        str(c.dirpath)
        for c in run.trainer.checkpoint_callbacks
        if c.dirpath is not None
    }

    def manifests_in(folder: str) -> dict[str, dict[str, Any]]:
        return find_manifests(
            folder, lambda message: log.warning("%s; it is left out", message)
        )

    found = {
        path: manifest
        for folder in given
        for path, manifest in manifests_in(folder).items()
    }
    if len(given) < len(run.trainer.checkpoint_callbacks) or not given:
        roots = {join(str(run.trainer.default_root_dir), "checkpoints")}
        for logger in run.trainer.loggers:
            root = getattr(logger, "root_dir", None) or logger.log_dir
            roots.update([str(root)] if root else [])
        own = type(run.module).__qualname__
        there = {
            path: manifest
            for root in roots
            for path, manifest in manifests_in(root).items()
        }
        found |= {
            path: manifest
            for path, manifest in there.items()
            if manifest.get("module") == own
        }
        others = sorted(
            {str(there[path].get("module")) for path in there if path not in found}
        )
        if others and not found:
            log.warning(
                "%d checkpoints, such as %r, are left out: they are of %s, and this module is a %s; if its class was "
                "renamed, pass the path of one", len(there), next(iter(there)), ", ".join(others), own,
            )  # fmt: skip
    usable = [
        path
        for path in found
        if run.state.fn != "fit" or found[path].get("resumable", True)
    ]
    if found and not usable:
        raise CheckpointError(
            f'ckpt_path="last": none of {len(found)} checkpoints, such as {next(iter(found))!r}, holds a run to '
            "resume: they were saved with save_weights_only=True, or by an Engine; load their weights with "
            "Module.load_from_checkpoint"
        )
    return sorted(
        usable, key=lambda path: found[path].get("created", 0.0), reverse=True
    )


def read_last(run: Run, weights_only: bool | None) -> dict[str, Any] | None:
    """Read the newest checkpoint, or the one before where it is damaged; None if there is none."""
    # All processes go by what the main one finds, and take the same: the first that all of them can read.
    for path in (
        candidates := run.engine.strategy.broadcast(
            run.trainer.is_global_zero and newest_checkpoints(run)
        )
    ):
        checkpoint, failed = None, None
        try:
            checkpoint = read_checkpoint(path, weights_only)
        except (CheckpointError, OSError) as error:
            failed = str(error)
        if not (
            told := [
                failure
                for failure in run.engine.strategy.gather_objects(failed)
                if failure
            ]
        ):
            run.resume_from(path)
            return checkpoint
        log.warning("%s; trying the one before", told[0])
    if candidates:
        raise CheckpointError(
            f'ckpt_path="last": all {len(candidates)} checkpoints that were found are damaged'
        )
    log.info(
        'ckpt_path="last": there is no checkpoint yet; starting from the beginning'
    )
    return None


def read_run(
    run: Run, ckpt_path: str, weights_only: bool | None
) -> dict[str, Any] | None:
    """Find and read the checkpoint for a run; None where there is nothing to resume."""
    run.engine.saver.wait()  # it may be the one that is being written
    if ckpt_path == "last":
        return read_last(run, weights_only)
    path = best_checkpoint(run) if ckpt_path == "best" else os.fspath(ckpt_path)
    run.ckpt_path = resolve(run.engine.strategy.broadcast(path))
    return read_checkpoint(run.ckpt_path, weights_only)


def restore_start(run: Run, checkpoint: dict[str, Any]) -> None:
    """Set the counters and the seed, and let the loggers go on where they were."""
    if "run" in checkpoint:
        run.state.load_state_dict(checkpoint["run"]["state"])
    saver = run.engine.saver
    saver.created = max(saver.created, checkpoint["manifest"].get("created", 0.0))
    if run.trainer.is_global_zero:  # which alone writes
        for logger, state in zip(
            run.trainer.loggers, checkpoint.get("loggers", []), strict=False
        ):
            logger.load_state_dict(state)


def restore_module(run: Run, checkpoint: dict[str, Any]) -> None:
    """Hooks, weights, and the states of data and callbacks."""
    module, datamodule = run.module, run.datamodule
    module.on_load_checkpoint(checkpoint)
    load_weights(
        run.engine.strategy.load_model_state,
        module,
        checkpoint,
        run.ckpt_path,
        module.strict_loading,
    )
    if datamodule is not None and "datamodule" in checkpoint:
        require_unsealed(checkpoint["datamodule"])
        datamodule.load_state_dict(checkpoint["datamodule"])
    for callback in run.trainer.callbacks:
        if overrides(callback, "on_load_checkpoint", Callback):
            callback.on_load_checkpoint(run.trainer, module, checkpoint)
    if run.state.fn != "fit":
        return  # an evaluation must not set back what a fit has found, such as the best checkpoints
    states = checkpoint.get("callbacks", {})
    for callback in run.trainer.callbacks:
        if callback.state_key in states:
            require_unsealed(states[callback.state_key])
            callback.load_state_dict(states[callback.state_key])
    known = {callback.state_key for callback in run.trainer.callbacks}
    if absent := sorted(set(states) - known):
        log.warning(
            "The checkpoint holds states of callbacks that this Trainer lacks: %s",
            ", ".join(absent),
        )


def restore_run(run: Run, checkpoint: dict[str, Any]) -> None:
    """Optimizers, counters, the data cursor; random generators and metrics follow when the loop has begun."""
    if "run" not in checkpoint or "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {run.ckpt_path!r} was saved with weights_only=True, or without a fit: it cannot resume "
            "a run; "
            "load its weights with Module.load_from_checkpoint"
        )
    saved = checkpoint["run"]
    configured = _options(run)
    try:
        run.step.load_state_dict(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {run.ckpt_path!r} does not fit this run: {error}"
        ) from error
    if run.trainer.is_global_zero:
        _tell_what_changed(run, checkpoint, configured)
    run.state.load_state_dict(saved["state"])
    if (accumulate := run.state.accumulate_grad_batches) not in (
        None,
        run.trainer.accumulate_grad_batches,
    ):
        log.info(
            "accumulate_grad_batches is %d, as it was set in the run that is resumed",
            accumulate,
        )
        run.trainer.accumulate_grad_batches = accumulate
    gathered = _gathered_part(
        run, [saved, *saved.get("peers", [])], checkpoint["manifest"]["world_size"]
    )
    generators = checkpoint["rng"]
    rng = None
    if generators:
        rng = generators[run.trainer.global_rank % len(generators)]
    run.resume_with({**gathered, "rng": rng})
    log.info(
        "Resuming from %s: epoch %d, step %d",
        run.ckpt_path,
        run.state.epoch,
        run.state.global_step,
    )


def _options(run: Run) -> dict[str, Any]:
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
    run: Run, checkpoint: dict[str, Any], configured: dict[str, Any]
) -> None:
    """Say which hyperparameters are other ones than in the checkpoint, and which of them count."""
    changed = []
    for owner, key in (
        (run.module, "hyper_parameters"),
        (run.datamodule, "datamodule_hyper_parameters"),
    ):
        saved, now = (
            checkpoint.get(key, {}),
            {} if owner is None else owner.portable_hparams(),
        )
        for name in {**saved, **now} if saved and isinstance(saved, dict) else ():
            was, is_now = saved.get(name), now.get(name)
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
        "optimizers and schedulers go on with the checkpoint's%s", ", ".join(changed),
        f" ({', '.join(kept)})" if kept else "",
    )  # fmt: skip


def _written(value: Any) -> str:
    """A hyperparameter as a checkpoint holds it: of a not-a-number, too, there are then two that are equal."""
    plain = json.loads(
        json.dumps(encode(value, "", {}, {}), default=repr), object_hook=_as_loaded
    )
    return json.dumps(plain, sort_keys=True)


def _as_loaded(written: dict[str, Any]) -> Any:
    """Without the classes that are known only where pickled objects are loaded."""
    items = written.get("$items")
    if items and all(isinstance(key, str) for key, _ in items):
        return dict(items)
    return written.get("$plain", written.get("$value", written))


def _gathered_part(
    run: Run, ranks: list[dict[str, Any]], saved_by: int
) -> dict[str, Any]:
    """What of the values that ``ranks`` gathered in the running epoch, and of the loaders' states, goes here.

    With another number of processes, the main one goes on with all that has been gathered, and the others with nothing.
    """
    rank = run.trainer.global_rank
    if saved_by == run.trainer.world_size and len(ranks) == saved_by:
        return ranks[rank]
    is_main = run.trainer.is_global_zero
    return {
        "metrics": merge_logged([own["metrics"] for own in ranks], keep=is_main),
        "metric_states": merge_metric_states(
            run.module, [own["metric_states"] for own in ranks], keep=is_main
        ),
        "loader": ranks[-1]["loader"],  # that of the process that has read furthest
        "cursor": ranks[0]["cursor"],
        "saved_by": saved_by,
    }
