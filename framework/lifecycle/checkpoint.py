"""What goes into a checkpoint of a run, and how a run or a module takes it back."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ..checkpoint.find import find_manifests, newest_first, resolve
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.saver import Save
from ..checkpoint.serialization import State, encode, require_loaded
from ..checkpoint.storage import join, storage_of
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
    checkpoint = {}
    of_this_rank = {}
    failed = None
    try:
        checkpoint = collect(run, weights_only)
        if not weights_only:
            of_this_rank = {"rng": rng_state(run.engine.device), **run.gathered()}
    except OSError as error:
        # Of a user's hook, on this rank alone; other errors end it, and so the others.
        failed = error
    by_rank = [of_this_rank]
    if together:
        by_rank, failed = gather_outcomes(strategy, path, failed, of_this_rank)
    elif not weights_only:
        lacks = (
            "the random states of the others and what they have logged in this epoch"
        )
        run.engine.warn_incomplete(
            "save_checkpoint", lacks, "all that resume take the main one's random state"
        )
    if failed is not None:
        raise failed
    rng = None
    if not weights_only:
        rng = [states["rng"] for states in by_rank]
        checkpoint["loader_states"] = [[states["loader"]] for states in by_rank]
        checkpoint["run"]["logged"] = [states["logged"] for states in by_rank]
        checkpoint["run"]["saved_by"] = by_rank[0]["saved_by"]
    facts = {
        "epoch": checkpoint["epoch"],
        "global_step": checkpoint["global_step"],
        "precision": run.engine.precision.name,
        "module": type(run.module).__qualname__,
        "metrics": as_floats(run.trainer.callback_metrics),
        "resumable": "optimizer_states" in checkpoint,
    }
    alone = not together
    return run.engine.saver.save(
        strategy,
        checkpoint,
        path,
        facts,
        rng,
        wait,
        on_complete,
        alone,
    )


def collect(run: Run, weights_only: bool) -> State:
    """What all ranks have alike of a run's checkpoint, as the hooks ``on_save_checkpoint`` see it."""
    trainer, datamodule = run.trainer, run.datamodule
    checkpoint: State = {
        "epoch": run.state.epoch,
        "global_step": run.state.global_step,
        "state_dict": run.engine.strategy.model_state(),
    }
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
        checkpoint["run"] = {"state": run.progress()}
        checkpoint["data_seed"] = run.state.seed
        if datamodule is not None and overrides(datamodule, "state_dict", DataModule):
            checkpoint["datamodule"] = datamodule.state_dict()
    for hook in run.hooks.on_save_checkpoint:
        hook(checkpoint)
    return checkpoint


def best_checkpoint(run: Run) -> str:
    """The best checkpoint of the first ``ModelCheckpoint``; of an earlier program's, if this one has not fitted."""
    callback = run.trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "")
    may_look = run.trainer.last_fit is None and not run.trainer.fast_dev_run
    if not best and callback is not None and may_look:
        best = run.engine.strategy.broadcast(
            run.trainer.is_global_zero and _best_of_earlier_programs(run, callback)
        )
        if best:
            log.info(
                'ckpt_path="best": this Trainer has not fitted; an earlier run left %s',
                best,
            )
    if not best:
        why = "no checkpoint was saved as best yet"
        if run.trainer.fast_dev_run:
            why = "fast_dev_run saves none"
        raise ValueError(
            f'ckpt_path="best": {why}; fit with a ModelCheckpoint, or pass a path'
        )
    return best


def _best_of_earlier_programs(run: Run, callback: Any) -> str:
    """The pointer to the best checkpoint in the folder where the newest one lies; of several runs there, the last's."""
    newest = newest_checkpoints(run)
    newest_path = newest[0] if newest else ""
    folder = callback.dirpath or newest_path.rpartition("/")[0]
    storage = storage_of(folder)
    named = _best_in(folder, callback) if storage.exists(folder) else []
    pointers = {}
    for path in named:
        if storage.is_file(path) and not is_weights_file(path):
            pointers[path] = read_manifest(resolve(path))
    if pointers:
        return newest_first(pointers)[0]
    if callback.monitor is None:
        return newest_path
    # With ``filename="best"``, what is called so is no pointer.
    values = {}
    for path in newest:
        value = read_manifest(path)["metrics"].get(callback.monitor)
        if path in named and value is not None and not math.isnan(value):
            values[path] = value
    choose = max if callback.mode == "max" else min
    return choose(values, key=values.__getitem__, default="")


def _best_in(folder: str, callback: Any) -> list[str]:
    """What is called as the best checkpoint is; the callback's name for it may hold the epoch."""
    beginning = callback.CHECKPOINT_NAME_BEST.partition("{")[0]
    return [
        join(folder, name)
        for name in storage_of(folder).names(folder)
        if name.startswith(beginning) and name.endswith(callback.FILE_EXTENSION)
    ]


def newest_checkpoints(run: Run) -> list[str]:
    """The complete checkpoints in the folders that the callbacks were given, newest first.

    Of a callback that was given none, in the default ones: those of the loggers, where each run has a folder of its
    own beside those of earlier runs, and of the Trainer; there, only what a module of this class saved.

    Raises:
        CheckpointError: if a fit is to resume, and all that were found hold no run.
    """
    callbacks = run.trainer.checkpoint_callbacks
    given = {str(each.dirpath) for each in callbacks if each.dirpath is not None}
    manifests = _manifests_in(given)
    if len(given) < len(callbacks) or not given:
        roots = {join(str(run.trainer.default_root_dir), "checkpoints")}
        for logger in run.trainer.loggers:
            root = getattr(logger, "root_dir", None) or logger.log_dir
            roots |= {str(root)} if root else set()
        _add_of_class(type(run.module).__qualname__, _manifests_in(roots), manifests)
    usable = manifests
    if run.state.fn == "fit":
        usable = {
            path: manifest
            for path, manifest in manifests.items()
            if manifest.get("resumable", True)
        }
    if manifests and not usable:
        raise CheckpointError(
            f'ckpt_path="last": none of {len(manifests)} checkpoints, such as {next(iter(manifests))!r}, holds a run '
            "to resume: they were saved with save_weights_only=True, or by an Engine; load their weights with "
            "Module.load_from_checkpoint"
        )
    return newest_first(usable)


def _manifests_in(folders: set[str]) -> dict[str, Manifest]:
    manifests = {}
    for folder in folders:
        manifests |= find_manifests(
            folder,
            lambda message: log.warning("%s; it is left out", message),
        )
    return manifests


def _add_of_class(
    name: str, there: dict[str, Manifest], manifests: dict[str, Manifest]
) -> None:
    """Add to ``manifests`` those that are ``there`` and were saved by a module of this class."""
    others = set()
    for path, manifest in there.items():
        if manifest.get("module") == name:
            manifests[path] = manifest
        elif path not in manifests:
            others.add(str(manifest.get("module")))
    if others and not manifests:
        log.warning(
            "%d checkpoints, such as %r, are left out: they are of %s, and this module is a %s; if its class was "
            "renamed, pass the path of one", len(there), next(iter(there)), ", ".join(sorted(others)), name,
        )  # fmt: skip


def read_last(run: Run, weights_only: bool | None) -> State | None:
    """Read the newest checkpoint, or the one before where it is damaged; None if there is none."""
    # All processes go by what the main one finds, and take the same: the first that all of them can read.
    strategy = run.engine.strategy
    candidates = strategy.broadcast(strategy.is_global_zero and newest_checkpoints(run))
    for path in candidates:
        checkpoint, failure = {}, None
        try:
            checkpoint = read_checkpoint(path, weights_only)
        except (CheckpointError, OSError) as error:
            failure = str(error)
        failures = strategy.gather_objects(failure)
        if not any(failures):
            run.resume_from(path)
            return checkpoint
        log.warning("%s; trying the one before", next(filter(None, failures)))
    if candidates:
        raise CheckpointError(
            f'ckpt_path="last": all {len(candidates)} checkpoints that were found are damaged'
        )
    log.info(
        'ckpt_path="last": there is no checkpoint yet; starting from the beginning'
    )
    return None


def read_run(
    run: Run,
    ckpt_path: str,
    weights_only: bool | None,
) -> State | None:
    """Find and read the checkpoint for a run; None where there is nothing to resume."""
    run.engine.saver.wait()  # it may be the one that is being written
    if ckpt_path == "last":
        return read_last(run, weights_only)
    path = best_checkpoint(run) if ckpt_path == "best" else os.fspath(ckpt_path)
    run.ckpt_path = resolve(run.engine.strategy.broadcast(path))
    return read_checkpoint(run.ckpt_path, weights_only)


def restore_start(run: Run, checkpoint: State) -> None:
    """Set the counters and the seed, and let the loggers go on where they were."""
    if "run" in checkpoint:
        run.state.load_state_dict(checkpoint["run"]["state"])
    saver = run.engine.saver
    saver.created = max(saver.created, checkpoint["manifest"].get("created", 0.0))
    if run.trainer.is_global_zero:  # which alone writes
        for logger, state in zip(
            run.trainer.loggers,
            checkpoint.get("loggers", []),
            strict=False,
        ):
            logger.load_state_dict(state)


def restore_module(run: Run, checkpoint: State) -> None:
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
        require_loaded(checkpoint["datamodule"])
        datamodule.load_state_dict(checkpoint["datamodule"])
    for callback in run.trainer.callbacks:
        if overrides(callback, "on_load_checkpoint", Callback):
            callback.on_load_checkpoint(run.trainer, module, checkpoint)
    if run.state.fn != "fit":
        return  # an evaluation must not set back what a fit has found, such as the best checkpoints
    states = checkpoint.get("callbacks", {})
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


def restore_run(run: Run, checkpoint: State) -> None:
    """Optimizers, counters, the data cursor; random generators and metrics follow when the loop has begun."""
    if "run" not in checkpoint or "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {run.ckpt_path!r} was saved with weights_only=True, or without a fit: it cannot resume "
            "a run; "
            "load its weights with Module.load_from_checkpoint"
        )
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
    if (accumulate := run.state.accumulate_grad_batches) not in (
        None,
        run.trainer.accumulate_grad_batches,
    ):
        log.info(
            "accumulate_grad_batches is %d, as it was set in the run that is resumed",
            accumulate,
        )
        run.trainer.accumulate_grad_batches = accumulate
    run.resume_with(_of_this_rank(run, checkpoint))
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
        json.dumps(encode(value, "", {}, {}), default=repr),
        object_hook=_as_loaded,
    )
    return json.dumps(plain, sort_keys=True)


def _as_loaded(written: State) -> Any:
    """Without the classes that are known only where pickled objects are loaded."""
    items = written.get("$items")
    if items and all(isinstance(key, str) for key, _ in items):
        return dict(items)
    return written.get("$plain", written.get("$value", written))


def _of_this_rank(run: Run, checkpoint: State) -> State:
    """What of the ranks' random generators, loaders and logged values goes here.

    With another number of ranks, the main one goes on with all that has been logged in the running epoch, and the
    others with nothing.
    """
    rank, world_size = run.trainer.global_rank, checkpoint["manifest"]["world_size"]
    logged, rng = checkpoint["run"]["logged"], checkpoint["rng"]
    loaders = [states[0] for states in checkpoint["loader_states"]]
    of_this_rank = {"rng": rng[rank % len(rng)] if rng else None}
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
        # The loader's own state is that of the rank that has read furthest.
        "loader": {**loaders[0], "loader": loaders[-1]["loader"]},
        "logged": {
            "metrics": merge_logged(metrics, is_main),
            "metric_states": merge_metric_states(run.module, states, is_main),
        },
        "saved_by": world_size,
    }
