"""Which checkpoint a run is to read: ``"best"``, ``"last"`` or a path."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ..checkpoint.find import find_manifests, is_pointer, newest_first, resolve
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.serialization import State
from ..checkpoint.storage import join, storage_of
from ..engine.checkpoint import read_checkpoint
from ..errors import CheckpointError, describe_error
from ..messages import log
from .from_lightning import adopt, adopt_average, is_of_lightning

if TYPE_CHECKING:
    from ..loop.run import Run


def best_checkpoint(run: Run) -> str:
    """Find the best checkpoint of the first ``ModelCheckpoint``; if this Trainer has not fitted, an earlier program's.

    Raises:
        ValueError: if there is none.
    """
    callback = run.trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "")
    may_look = run.trainer.last_fit is None and not run.trainer.fast_dev_run
    if not best and callback is not None and may_look:
        best = run.engine.strategy.broadcast(  # collective
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
    """Find what an earlier program has left as its best checkpoint; an empty string if there is none.

    It is looked for in the callback's folder, or else in that of the newest checkpoint. A ``ModelCheckpoint`` leaves a
    pointer to its best one there; where several runs have left theirs, the newest checkpoint's counts.
    """
    newest = newest_checkpoints(run)
    newest_path = newest[0] if newest else ""
    folder = callback.dirpath or newest_path.rpartition("/")[0]
    storage = storage_of(folder)
    named = _best_in(folder, callback) if storage.exists(folder) else []
    pointers = {}
    for path in named:
        if is_pointer(path):
            pointers[path] = read_manifest(resolve(path))
    if pointers:
        return newest_first(pointers)[0]
    if callback.monitor is None:
        return newest_path
    # With ``filename="best"``, what has the name of a pointer is a checkpoint: its monitored value decides.
    values = {}
    for path in newest:
        value = read_manifest(path)["metrics"].get(callback.monitor)
        if path in named and value is not None and not math.isnan(value):
            values[path] = value
    choose = max if callback.mode == "max" else min
    return choose(values, key=values.__getitem__, default="")


def _best_in(folder: str, callback: Any) -> list[str]:
    """The paths in ``folder`` that have the name of a pointer to the best checkpoint."""
    # After its beginning, the name may have fields to fill in, such as the epoch.
    beginning = callback.CHECKPOINT_NAME_BEST.partition("{")[0]
    return [
        join(folder, name)
        for name in storage_of(folder).names(folder)
        if name.startswith(beginning) and name.endswith(callback.FILE_EXTENSION)
    ]


def newest_checkpoints(run: Run, names: Collection[str] = ()) -> list[str]:
    """The complete checkpoints in the folders that the callbacks were given, newest first.

    If a callback was given none, or there is no callback, the default ones are searched, too: those of the loggers,
    where each run has a folder beside those of earlier runs, and of the Trainer. There, only what a module of this
    class has saved counts.

    Args:
        run: the run.
        names: only those of the fit that has one of these names; see :attr:`~..loop.run.Run.name`.

    Raises:
        CheckpointError: if a fit is to resume, and all that were found hold no run.
    """
    callbacks = run.trainer.checkpoint_callbacks
    dirpaths = [each.dirpath for each in callbacks]
    given = {str(path) for path in dirpaths if path is not None}
    endings = {".ckpt", *(each.FILE_EXTENSION for each in callbacks)}
    manifests = _manifests_in(given, endings)
    if None in dirpaths or not dirpaths:
        roots = {join(str(run.trainer.default_root_dir), "checkpoints")}
        for logger in run.trainer.loggers:
            root = getattr(logger, "root_dir", None) or logger.log_dir
            roots |= {str(root)} if root else set()
        _add_of_class(
            type(run.module).__qualname__, _manifests_in(roots, endings), manifests
        )
    if names:
        manifests = {
            path: manifest
            for path, manifest in manifests.items()
            if manifest.get("fit") in names
        }
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


def _manifests_in(folders: set[str], endings: set[str]) -> dict[str, Manifest]:
    manifests = {}
    for folder in folders:
        manifests |= find_manifests(
            folder,
            lambda message: log.warning("%s; it is left out", message),
            (*endings,),
        )
    return manifests


def _add_of_class(
    name: str, candidates: dict[str, Manifest], manifests: dict[str, Manifest]
) -> None:
    """Add to ``manifests`` those of the candidates that a module of the class ``name`` has saved."""
    others = set()
    for path, manifest in candidates.items():
        if manifest.get("module") == name:
            manifests[path] = manifest
        elif path not in manifests:
            others.add(str(manifest.get("module")))
    if others and not manifests:
        log.warning(
            "%d checkpoints, such as %r, are left out: they are of %s, and this module is a %s; if its class was "
            "renamed, pass the path of one",
            len(candidates),
            next(iter(candidates)),
            ", ".join(sorted(others)),
            name,
        )


def read_last(run: Run, weights_only: bool | None) -> State | None:
    """Read the newest checkpoint, or the one before where it is damaged; None if there is none. A collective."""
    # All ranks go by what the main one finds, and take the same: the first that all of them can read.
    strategy = run.engine.strategy
    candidates = strategy.broadcast(strategy.is_global_zero and newest_checkpoints(run))
    checkpoint = read_first(run, candidates, weights_only)
    if checkpoint is not None:
        return checkpoint
    if candidates:
        raise CheckpointError(
            f'ckpt_path="last": all {len(candidates)} checkpoints that were found are damaged'
        )
    log.info(
        'ckpt_path="last": there is no checkpoint yet; starting from the beginning'
    )
    return None


def read_first(
    run: Run, paths: Iterable[str], weights_only: bool | None
) -> State | None:
    """Read the first of these checkpoints that all ranks can read; None if there is none. A collective."""
    for path in paths:
        checkpoint = {}
        failure = None
        try:
            checkpoint = read_checkpoint(run.engine, path, weights_only)
        except (CheckpointError, OSError) as error:
            failure = describe_error(error)
        failures = run.engine.strategy.gather_objects(failure)  # collective
        if not any(failures):
            run.resume_from(path)
            adopt_average(run, checkpoint)
            return checkpoint
        log.warning("%s; trying the one before", next(filter(None, failures)))
    return None


def read_run(
    run: Run,
    ckpt_path: str,
    weights_only: bool | None,
) -> State | None:
    """Find and read the checkpoint for a run; None if ``"last"`` was asked for and there is none. A collective."""
    # It may be the one that is still being written.
    run.engine.saver.wait()
    if ckpt_path == "last":
        return read_last(run, weights_only)
    path = best_checkpoint(run) if ckpt_path == "best" else os.fspath(ckpt_path)
    path = resolve(run.engine.strategy.broadcast(path))  # collective
    run.resume_from(path)
    checkpoint = read_checkpoint(run.engine, path, weights_only)
    if run.fn == "fit" and is_of_lightning(checkpoint):
        adopt(run, checkpoint)
    adopt_average(run, checkpoint)
    return checkpoint
