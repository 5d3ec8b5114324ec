"""The SLURM job that this process is in: how it is told apart from others, when it ends, and how it is begun again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from .environment import SWITCH

# Names of jobs that `srun --pty bash` and `salloc` give, in which a person sits.
_INTERACTIVE = ("bash", "interactive", "sh", "zsh")

# A run begins to save so long before the job's end, but for a job that is shorter than ten times that.
MARGIN_SECONDS = 120.0
_MARGIN_OF_SHORT_JOBS = 0.1


@dataclass(frozen=True)
class SlurmJob:
    """A job of SLURM's.

    Attributes:
        name: as ``scontrol`` takes it: the job's number, or for a task of an array ``<job>_<task>``.
        interactive: a person sits in it, and it cannot be begun again.
        restarts: how often it was put back into the queue.
        end_time: when SLURM will end it, in seconds since 1970; None if that is not known.
        time_limit: how long it may run, in seconds; None if that is not known.
        num_tasks: how many processes it is for.
        in_step: whether ``srun`` has started this process.
    """

    name: str
    interactive: bool = False
    restarts: int = 0
    end_time: int | None = None
    time_limit: int | None = None
    num_tasks: int = 1
    in_step: bool = False

    @property
    def margin(self) -> float:
        """How long before its end a run has to begin to save, in seconds."""
        if self.time_limit is None:
            return MARGIN_SECONDS
        return min(MARGIN_SECONDS, self.time_limit * _MARGIN_OF_SHORT_JOBS)

    def with_times(self) -> SlurmJob:
        """Return this job with its end and its time limit, which SLURM tells unasked from 23.02 on."""
        if self.end_time is not None:
            return self
        command = ["squeue", "--noheader", "--format=%S %e", f"--jobs={self.name}"]
        env = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=60
            )
            begin, end = map(datetime.fromisoformat, done.stdout.split())
        # ValueError: what came is not two times.
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return self
        limit = int((end - begin).total_seconds())
        return replace(self, end_time=int(end.timestamp()), time_limit=limit)

    def is_late(self, now: float) -> bool:
        """Whether less than a quarter of its time is left at ``now``, in seconds since 1970; False if nobody knows."""
        if self.end_time is None or self.time_limit is None:
            return False
        return self.end_time - now < self.time_limit / 4

    def requeue(self) -> str:
        """Put the job back into the queue; returns why that failed, or an empty string."""
        command = ["scontrol", "requeue", self.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {error}"
        if done.returncode == 0:
            return ""
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        return f"{' '.join(command)}: {said}"


def slurm_job(env: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the job that this process is in, or None.

    Args:
        env: the environment variables.
    """
    job = env.get("SLURM_JOB_ID")
    if not job or env.get(SWITCH) == "off":
        return None
    array = env.get("SLURM_ARRAY_JOB_ID")
    task = env.get("SLURM_ARRAY_TASK_ID")
    begin, end = (
        _number(env, "SLURM_JOB_START_TIME"),
        _number(env, "SLURM_JOB_END_TIME"),
    )
    return SlurmJob(
        # Never the number of an array alone: that is all of its tasks.
        name=f"{array}_{task}" if array and task else job,
        interactive=env.get("SLURM_JOB_NAME") in _INTERACTIVE,
        restarts=_number(env, "SLURM_RESTART_COUNT") or 0,
        end_time=end,
        time_limit=None if begin is None or end is None else end - begin,
        num_tasks=_number(env, "SLURM_NTASKS") or 1,
        in_step="SLURM_STEP_ID" in env and "SLURM_PROCID" in env,
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else None
