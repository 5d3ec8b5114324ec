"""Whether this job was started before: by a scheduler, an agent of torchelastic's, or whoever names it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from .environment import ATTEMPT, JOB_OF_AGENTS, SWITCH
from .processes import status_of
from .slurm import slurm_job

# A variable for other schedulers: a name of the job that is the same whenever the job is started again.
JOB = "LOOPWRIGHT_JOB"


@dataclass(frozen=True)
class Attempt:
    """One of the attempts that a scheduler or an agent makes at a job.

    Attributes:
        job: a name that all attempts at this job have, and no other job.
        restarts: how many attempts came before; None if whoever names the job does not tell.
        allowed: how many restarts there may be, of an agent's.
    """

    job: str
    restarts: int | None
    allowed: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether nothing has been done for this job before."""
        return self.restarts == 0

    @property
    def is_only(self) -> bool:
        """Whether there is no other attempt before or after."""
        return self.allowed == 0

    @property
    def words(self) -> str:
        """The beginning of a message about an attempt that is not the first."""
        if not self.restarts or self.allowed is None:
            return f"This job ({self.job}) was started again"
        # A machine that joins is a reason to restart, too, and is not counted among those that are allowed.
        of = f" of {self.allowed}" if self.restarts <= self.allowed else ""
        return f"Restart {self.restarts}{of}"


def this_attempt(env: Mapping[str, str] = os.environ) -> Attempt | None:
    """Return which attempt at which job this process is part of; None where nobody starts it again.

    Args:
        env: the environment variables. The count of torchelastic's agents may differ between machines, so that the
            main process's counts.
    """
    if env.get(SWITCH) == "off":
        return None
    if name := env.get(JOB):
        return Attempt(name, None)
    restarts = int(env.get(ATTEMPT) or env.get("TORCHELASTIC_RESTART_COUNT", 0))
    slurm = slurm_job(env)
    if slurm is not None and not slurm.interactive:
        cluster = env.get("SLURM_CLUSTER_NAME", "slurm")
        return Attempt(f"{cluster} {slurm.name}", slurm.restarts + restarts)
    run = env.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    allowed = int(env.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if job := env.get(JOB_OF_AGENTS):
        # There may be restarts for machines that join, even if there are no others.
        return Attempt(f"torchelastic {job}", restarts, allowed or None)
    if run != "none":
        return Attempt(f"torchelastic {run}", restarts, allowed)
    # torchrun gives this name to all jobs that are given none.
    agent = f"{socket.gethostname()} {os.getppid()}"
    return Attempt(f"torchrun {agent} {_start_of_agent()}", restarts, allowed)


def _start_of_agent() -> str:
    """Return when this process's parent has started, in the system's units; empty if the system does not tell."""
    try:
        return status_of(os.getppid())[19]
    except (OSError, IndexError):
        return ""
