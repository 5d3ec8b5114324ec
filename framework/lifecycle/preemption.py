"""A SLURM job whose time is up: it is told to save in time, and put back into the queue."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...strategies.launch.slurm import SlurmJob, slurm_job
from ..data.workers import WARNINGS, is_free
from ..messages import log

if TYPE_CHECKING:
    from ..trainer import Trainer

# SLURM's KillWait: from its SIGTERM on, a process has so long.
_LONGEST_END = timedelta(seconds=30)


class _Program:
    """What :func:`requeue_outside` has to know.

    Attributes:
        process: the process that has fitted; those that it has forked inherit its handlers.
        is_main: whether it is the main rank's.
    """

    process = 0
    is_main = False


_program = _Program()


def requeue_outside(number: int, frame: FrameType | None) -> None:
    """Put the job back into the queue while nothing is trained, and nothing is to be saved: the handler of a warning.

    SLURM then ends all processes.
    """
    if os.getpid() != _program.process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _program.is_main:
        job = slurm_job()
        assert job is not None
        if not _requeue(job, has_saved=False):
            raise SystemExit(128 + number)


def _requeue(job: SlurmJob, has_saved: bool) -> bool:
    """Put a job back into the queue, and say what has come of it; returns whether it is there."""
    job = job.with_times()
    if not has_saved and job.is_late(time.time()):
        log.error(
            "SLURM job %s is not put back into the queue: its time was up before the first step, and another "
            "attempt would get no further; give it more time",
            job.name,
        )
        return False
    if failure := job.requeue():
        log.error(
            "SLURM job %s could not be put back into the queue (%s); its checkpoint is there: "
            'a run with ckpt_path="last" goes on from it',
            job.name,
            failure,
        )
        return False
    log.warning("SLURM job %s is back in the queue", job.name)
    return True


class Preemption:
    """What a fit does on account of the SLURM job that it runs in, if it runs in one and the user has not said no.

    Args:
        trainer: which fits.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._job = slurm_job() if trainer.auto_requeue else None
        self._trainer = trainer
        self._timer: threading.Timer | None = None
        # Where the main rank tells that it has done all that it has to do.
        self._store: Any = None

    def stand_by(self) -> None:
        """Put the job back into the queue at a warning from now on, while nothing is trained, as a fit begins."""
        can_set = threading.current_thread() is threading.main_thread()
        if not can_set or self._trainer.checkpoint_callback is None:
            return
        for number in WARNINGS:
            if self.requeues_for(number) and is_free(number):
                _program.process = os.getpid()
                _program.is_main = self._trainer.is_global_zero
                signal.signal(number, requeue_outside)

    def begin(self) -> None:
        """Say what will be done, and ask to end when the job's time is nearly up. Called when training begins."""
        job = self._job
        trainer = self._trainer
        if job is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if trainer.checkpoint_callback is None:
            log.info(
                "SLURM job %s is not put back into the queue when its time is up: there is no ModelCheckpoint",
                job.name,
            )
            return
        self._job = job = job.with_times()
        then = "saves and ends"
        if not job.interactive:
            then = "saves and puts its job back into the queue"
        when = "at SIGUSR1 or SIGUSR2"
        if job.end_time is not None:
            at = datetime.fromtimestamp(job.end_time).strftime("%Y-%m-%d %H:%M:%S")
            when += f", or {job.margin:.0f} s before {at}, its time limit"
        log.info(
            "SLURM job %s: %s, this run %s; auto_requeue=False switches that off",
            job.name,
            when,
            then,
        )
        if job.end_time is not None:
            seconds = job.end_time - job.margin - time.time()
            self._timer = threading.Timer(max(seconds, 0.0), self._ask_to_end)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """Forget the time limit."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask_to_end(self) -> None:
        assert self._job is not None
        log.warning("SLURM job %s is about to end by its time limit", self._job.name)
        self._trainer.consensus.request_end_by_signal(signal.SIGUSR1)

    def requeues_for(self, number: int) -> bool:
        """Whether the signal ``number`` asks to put the job back into the queue: SIGTERM is ``scancel``'s, too."""
        job = self._job
        return job is not None and not job.interactive and number in WARNINGS

    def requeue(self, has_saved: bool) -> None:
        """Put the job back into the queue, from the main rank. SLURM then sends SIGTERM, which is ignored: this ends.

        A collective, as ``srun`` may kill the others as soon as one has ended.

        Args:
            has_saved: whether there is a checkpoint to go on from.
        """
        assert self._job is not None
        # SLURM gives 30 s from here on (its KillWait), unless it is configured otherwise.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._trainer.is_global_zero:
            _requeue(self._job, has_saved)
        group = self._trainer.strategy.group
        self._store = group.store("requeue")
        group.barrier()  # collective

    def wait_for_main(self) -> None:
        """Wait at the end, if the job is back in the queue, until the main rank has ended its loggers, too."""
        if self._store is None:
            return
        # It may be gone already, or need longer than SLURM gives it.
        with suppress(RuntimeError):
            if self._trainer.is_global_zero:
                self._store.set("ended", "")
            else:
                self._store.wait(["ended"], _LONGEST_END)
