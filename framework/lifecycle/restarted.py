"""Going on by itself: a fit of a job that was started again resumes from what this very fit has saved last."""

from __future__ import annotations

import hashlib
import itertools
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ...strategies.launch.attempts import this_attempt
from ..checkpoint.serialization import State
from ..messages import log
from .find import newest_checkpoints, read_first

if TYPE_CHECKING:
    from ..loop.run import Run, RunRequest
    from ..trainer import Trainer

_numbers = itertools.count(1)


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
    candidates: list[str] = []
    restarts = 0
    if strategy.is_global_zero and not attempt.is_first:
        candidates = newest_checkpoints(run, run.name)
        restarts = attempt.restarts or 0
    # The counts of torchelastic's agents on different machines may differ.
    candidates, restarts = strategy.broadcast((candidates, restarts))  # collective
    checkpoint = read_first(run, candidates, weights_only) if candidates else None
    if checkpoint is not None:
        instead = "" if ckpt_path is None else f", and not from ckpt_path={ckpt_path!r}"
        log.info(
            "This job (%s) was started again: going on from %s%s",
            attempt.job, run.ckpt_path, instead,
        )  # fmt: skip
    elif restarts:
        log.warning(
            "This job (%s) was started again, and there is no checkpoint of its attempts before, where this "
            "Trainer saves: starting as the first one did", attempt.job,
        )  # fmt: skip
    return checkpoint
