"""Going on by itself: a fit of a job that was started again resumes from what this very fit has saved last."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ...strategies.launch.attempts import this_attempt
from ..checkpoint.serialization import State
from ..checkpoint.storage import join, storage_of, write_file
from ..messages import log
from .find import newest_checkpoints, read_first

if TYPE_CHECKING:
    from ..loop.run import Run, RunRequest
    from ..trainer import Trainer

_numbers = itertools.count(1)

# In bytes.
_LONGEST_NOTE = 1 << 20


def numbered(request: RunRequest) -> RunRequest:
    """Give a fit its number in the program: whoever starts the program again finds what the same fit has saved."""
    if request.fn != "fit" or request.search is not None or request.number:
        return request
    return replace(request, number=next(_numbers))


def name_of_fit(trainer: Trainer, number: int) -> str:
    """A name for the fit that all attempts at a job share, and nothing else; empty where nobody starts a job again.

    A job may run several programs, and each several fits.

    Args:
        trainer: which fits.
        number: of the fit in this program; 0 for what has no number.
    """
    attempt = this_attempt()
    # Copies beside each other have the same number.
    is_one_of_many = trainer.engine.is_copy
    if attempt is None or not number or is_one_of_many or trainer.fast_dev_run:
        return ""
    command = hashlib.sha256("\0".join(sys.argv).encode(errors="replace"))
    return f"{attempt.job}, program {command.hexdigest()[:12]}, fit {number}"


def read_earlier_attempt(
    run: Run, ckpt_path: str | None, weights_only: bool | None
) -> State | None:
    """Read the newest checkpoint of the attempts before this one; None if this is the first. A collective.

    Args:
        run: the fit.
        ckpt_path: what the user has asked for, which holds for the first attempt only.
        weights_only: as passed.
    """
    attempt = this_attempt()
    if attempt is None or not run.name or not run.trainer.auto_requeue:
        return None
    strategy = run.engine.strategy
    # Agents on different machines may have been started at different times, and count from then.
    known = strategy.gather_objects((run.name, attempt))  # collective
    names = [name for name, _ in known]
    attempt = max((one for _, one in known), key=lambda one: one.restarts or 0)
    candidates: list[str] = []
    if strategy.is_global_zero and not attempt.is_first:
        candidates = newest_checkpoints(run, names)
    candidates = strategy.broadcast(candidates)  # collective
    checkpoint = read_first(run, candidates, weights_only) if candidates else None
    if checkpoint is not None:
        instead = "" if ckpt_path is None else f", and not from ckpt_path={ckpt_path!r}"
        log.info("%s: going on from %s%s", attempt.words, run.ckpt_path, instead)
    elif attempt.restarts:
        log.warning(
            "%s: there is no checkpoint of the attempts before, where this Trainer saves: starting as the first one "
            "did",
            attempt.words,
        )
    return checkpoint


# What an attempt leaves for the next one where that finds no checkpoint: the same folders for the same curves.


def keep_loggers(run: Run) -> None:
    """Go on in the folders of the attempts before, and note them for the next one, until there is a checkpoint.

    The main rank calls this, before loggers choose their folders.
    """
    path = _note_path(run)
    if not path:
        return
    storage = storage_of(path)
    loggers = run.trainer.loggers
    states = None
    if storage.exists(path):
        states = json.loads(storage.read_at_most(path, _LONGEST_NOTE))
    if run.resume.is_from_checkpoint:
        if states is not None:
            storage.remove(path)
        return
    for logger, state in zip(loggers, states or (), strict=False):
        logger.load_state_dict(state)
    for logger in loggers:
        logger.claim()
    if states is None:
        states = [logger.state_dict() for logger in loggers]
        write_file(path, json.dumps(states, default=str).encode())


def forget_loggers(run: Run) -> None:
    """The fit has come to its end, and nothing is started again."""
    path = _note_path(run)
    if path and storage_of(path).exists(path):
        storage_of(path).remove(path)


def _note_path(run: Run) -> str:
    """Where this fit keeps its note; empty if it needs none."""
    attempt = this_attempt()
    is_main = run.trainer.is_global_zero
    if attempt is None or attempt.is_only or not run.name or not is_main:
        return ""
    if not run.trainer.loggers:
        return ""
    name = hashlib.sha256(run.name.encode()).hexdigest()[:16]
    return join(str(run.trainer.default_root_dir), f".attempt-{name}.json")
