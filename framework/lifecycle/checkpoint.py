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
from ..errors import CheckpointError, exchange
from ..from_checkpoint import load_weights
from ..messages import log
from ..metrics.metric_state import merge_metric_states
from ..metrics.values import as_floats, merge_logged
from ..names import overrides
from ..seed import rng_state

if TYPE_CHECKING:
    from ..trainer import Trainer


def can_save_alone(trainer: Trainer) -> bool:
    """Whether this process can write a checkpoint without the others: it has all that resuming cannot do without."""
    if not trainer.is_global_zero or trainer.strategy.shards_state:
        return False
    if trainer.world_size == 1 or not trainer.fitted:
        return True
    # The state of a loader that keeps one differs between processes.
    state = trainer.data.loader_state(trainer.progress()["batch_idx"])
    states = state if isinstance(state, list) else [state]
    return not any(states)


def save_run(
    trainer: Trainer,
    path: str,
    weights_only: bool,
    wait: bool = True,
    on_complete: Callable[[], None] | None = None,
    together: bool = True,
) -> Save:
    """Write a checkpoint of the run as it stands; with several processes, one writes, and all call this together."""
    if (
        trainer.strategy.failed
        and trainer.strategy.shards_state
        and trainer.world_size > 1
    ):
        raise RuntimeError(
            f"no checkpoint can be saved after an exception under strategy={trainer.strategy.name!r}: each process has "
            "a part of the state only, and the others may be gone"
        )
    checkpoint, rng, failed = {}, None, None
    try:
        checkpoint = collect(trainer, weights_only)
        rng = None if weights_only else rng_state(trainer.engine.device)
    except OSError as error:  # of a user's hook, in this process alone; other errors end it, and so the others
        failed = error
    peers = (
        together
        and trainer.world_size > 1
        and rng is not None
        and not trainer.strategy.failed
    )
    own = trainer.gathered() if peers and not trainer.is_global_zero else None
    told: list[Any] = [(rng, None)]
    if together:
        told, failed = exchange(trainer.strategy, path, failed, (rng, own))
    elif not weights_only:
        lacks = (
            "the random states of the others and what they have logged in this epoch"
        )
        trainer.engine.tell_alone(
            "save_checkpoint", lacks, "all that resume take the main one's random state"
        )
    if failed is not None:
        raise failed
    if peers:
        checkpoint["run"]["peers"] = [own for _, own in told[1:]]
    facts = {
        "epoch": checkpoint["epoch"],
        "global_step": checkpoint["global_step"],
        "precision": trainer.engine.precision.name,
        "module": type(trainer.module).__qualname__,
        "metrics": as_floats(trainer.callback_metrics),
        "resumable": "optimizer_states" in checkpoint,
    }
    generators = None if weights_only else [own for own, _ in told]
    alone = not together
    return trainer.engine.saver.save(
        trainer.strategy, checkpoint, path, facts, generators, wait, on_complete, alone
    )


def collect(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """The checkpoint of a run, as the hooks ``on_save_checkpoint`` see it."""
    module, state = trainer.module, trainer.state
    checkpoint: dict[str, Any] = {
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": trainer.strategy.model_state(),
    }
    for owner, key in (
        (module, "hyper_parameters"),
        (trainer.datamodule, "datamodule_hyper_parameters"),
    ):
        if owner is not None and owner.hparams:
            checkpoint[key] = owner.portable_hparams()
            checkpoint[f"{key}_call"] = owner.hparams_call
    if not weights_only:
        checkpoint["callbacks"] = {
            c.state_key: s for c in trainer.callbacks if (s := c.state_dict())
        }
        if trainer.fitted:
            checkpoint.update(trainer.optimization.state_dict())
        checkpoint["loggers"] = [logger.state_dict() for logger in trainer.loggers]
        checkpoint["run"] = {"state": trainer.progress(), **trainer.gathered()}
        if (datamodule := trainer.datamodule) is not None and overrides(
            datamodule, "state_dict", DataModule
        ):
            checkpoint["datamodule"] = datamodule.state_dict()
    for hook in trainer.bus.on_save_checkpoint:
        hook(checkpoint)
    return checkpoint


def best_checkpoint(trainer: Trainer) -> str:
    """The best checkpoint of the first ``ModelCheckpoint``; of an earlier program's, if this one has not fitted."""
    callback = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "")
    if not best and not (
        callback is None
        or trainer.fast_dev_run
        or trainer.fitted
        or trainer.carried is not None
    ):
        best = trainer.strategy.broadcast(
            trainer.is_global_zero and _best_of_earlier_programs(trainer, callback)
        )
        if best:
            log.info(
                'ckpt_path="best": this Trainer has not fitted; an earlier run left %s',
                best,
            )
    if not best:
        why = (
            "fast_dev_run saves none"
            if trainer.fast_dev_run
            else "no checkpoint was saved as best yet"
        )
        raise ValueError(
            f'ckpt_path="best": {why}; fit with a ModelCheckpoint, or pass a path'
        )
    return best


def _best_of_earlier_programs(trainer: Trainer, callback: Any) -> str:
    """The pointer to the best checkpoint in the folder where the newest one lies; of several runs there, the last's."""
    newest = newest_checkpoints(trainer)
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


def newest_checkpoints(trainer: Trainer) -> list[str]:
    """The complete checkpoints in the folders that the callbacks were given, newest first.

    Of a callback that was given none, in the default ones: those of the loggers, where each run has a folder of its
    own beside those of earlier runs, and of the Trainer; there, only what a module of this class saved.

    Raises:
        CheckpointError: if a fit is to resume, and all that were found hold no run.
    """
    given = {
        str(c.dirpath) for c in trainer.checkpoint_callbacks if c.dirpath is not None
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
    if len(given) < len(trainer.checkpoint_callbacks) or not given:
        roots = {join(str(trainer.default_root_dir), "checkpoints")}
        for logger in trainer.loggers:
            root = getattr(logger, "root_dir", None) or logger.log_dir
            roots.update([str(root)] if root else [])
        own = type(trainer.module).__qualname__
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
        if trainer.state.fn != "fit" or found[path].get("resumable", True)
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


def read_last(trainer: Trainer, weights_only: bool | None) -> dict[str, Any] | None:
    """Read the newest checkpoint, or the one before where it is damaged; None if there is none."""
    # All processes go by what the main one finds, and take the same: the first that all of them can read.
    for path in (
        candidates := trainer.strategy.broadcast(
            trainer.is_global_zero and newest_checkpoints(trainer)
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
                for failure in trainer.strategy.gather_objects(failed)
                if failure
            ]
        ):
            trainer.ckpt_path = path
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
    trainer: Trainer, ckpt_path: str, weights_only: bool | None
) -> dict[str, Any] | None:
    """Find and read the checkpoint for a run; None where there is nothing to resume."""
    trainer.engine.saver.wait()  # it may be the one that is being written
    if ckpt_path == "last":
        return read_last(trainer, weights_only)
    path = best_checkpoint(trainer) if ckpt_path == "best" else os.fspath(ckpt_path)
    trainer.ckpt_path = resolve(trainer.strategy.broadcast(path))
    return read_checkpoint(trainer.ckpt_path, weights_only)


def restore_start(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Set the counters and the seed, and let the loggers go on where they were."""
    if "run" in checkpoint:
        trainer.state.load_state_dict(checkpoint["run"]["state"])
    saver = trainer.engine.saver
    saver.created = max(saver.created, checkpoint["manifest"].get("created", 0.0))
    if trainer.is_global_zero:  # which alone writes
        for logger, state in zip(
            trainer.loggers, checkpoint.get("loggers", []), strict=False
        ):
            logger.load_state_dict(state)


def restore_module(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Hooks, weights, and the states of data and callbacks."""
    module, datamodule = trainer.module, trainer.datamodule
    module.on_load_checkpoint(checkpoint)
    load_weights(
        trainer.strategy.load_model_state,
        module,
        checkpoint,
        trainer.ckpt_path,
        module.strict_loading,
    )
    if datamodule is not None and "datamodule" in checkpoint:
        require_unsealed(checkpoint["datamodule"])
        datamodule.load_state_dict(checkpoint["datamodule"])
    for callback in trainer.callbacks:
        if overrides(callback, "on_load_checkpoint", Callback):
            callback.on_load_checkpoint(trainer, module, checkpoint)
    if trainer.state.fn != "fit":
        return  # an evaluation must not set back what a fit has found, such as the best checkpoints
    states = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:
        if callback.state_key in states:
            require_unsealed(states[callback.state_key])
            callback.load_state_dict(states[callback.state_key])
    known = {callback.state_key for callback in trainer.callbacks}
    if absent := sorted(set(states) - known):
        log.warning(
            "The checkpoint holds states of callbacks that this Trainer lacks: %s",
            ", ".join(absent),
        )


def restore_run(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Optimizers, counters, the data cursor; random generators and metrics follow when the loop has begun."""
    if "run" not in checkpoint or "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {trainer.ckpt_path!r} was saved with weights_only=True, or without a fit: it cannot resume "
            "a run; "
            "load its weights with Module.load_from_checkpoint"
        )
    run = checkpoint["run"]
    configured = _options(trainer)
    try:
        trainer.optimization.load_state_dict(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {trainer.ckpt_path!r} does not fit this run: {error}"
        ) from error
    if trainer.is_global_zero:
        _tell_what_changed(trainer, checkpoint, configured)
    trainer.state.load_state_dict(run["state"])
    if (accumulate := trainer.state.accumulate_grad_batches) not in (
        None,
        trainer.accumulate_grad_batches,
    ):
        log.info(
            "accumulate_grad_batches is %d, as it was set in the run that is resumed",
            accumulate,
        )
        trainer.accumulate_grad_batches = accumulate
    rank = trainer.global_rank
    trainer.resumed = {
        **_gathered_part(
            trainer, [run, *run.get("peers", [])], checkpoint["manifest"]["world_size"]
        ),
        "rng": checkpoint["rng"][rank % len(checkpoint["rng"])]
        if checkpoint["rng"]
        else None,
    }
    log.info(
        "Resuming from %s: epoch %d, step %d",
        trainer.ckpt_path,
        trainer.state.epoch,
        trainer.state.global_step,
    )


def _options(trainer: Trainer) -> dict[str, Any]:
    """The options of all optimizers' parameter groups, such as the learning rate."""
    groups = [
        group for optimizer in trainer.optimizers for group in optimizer.param_groups
    ]
    return {
        f"{name} of parameter group {number}": value
        for number, group in enumerate(groups)
        for name, value in group.items()
        if name not in ("params", "initial_lr")
    }


def _tell_what_changed(
    trainer: Trainer, checkpoint: dict[str, Any], configured: dict[str, Any]
) -> None:
    """Say which hyperparameters are other ones than in the checkpoint, and which of them count."""
    changed = []
    for owner, key in (
        (trainer.module, "hyper_parameters"),
        (trainer.datamodule, "datamodule_hyper_parameters"),
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
    options = _options(trainer)
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
    trainer: Trainer, ranks: list[dict[str, Any]], saved_by: int
) -> dict[str, Any]:
    """What of the values that ``ranks`` gathered in the running epoch, and of the loaders' states, goes here.

    With another number of processes, the main one goes on with all that has been gathered, and the others with nothing.
    """
    rank = trainer.global_rank
    if saved_by == trainer.world_size and len(ranks) == saved_by:
        return ranks[rank]
    is_main = trainer.is_global_zero
    return {
        "metrics": merge_logged([own["metrics"] for own in ranks], keep=is_main),
        "metric_states": merge_metric_states(
            trainer.module, [own["metric_states"] for own in ranks], keep=is_main
        ),
        "loader": ranks[-1]["loader"],  # that of the process that has read furthest
        "cursor": ranks[0]["cursor"],
        "saved_by": saved_by,
    }
