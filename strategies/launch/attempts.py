"""Whether this job was started before: by a scheduler, an agent of torchelastic's, or whoever names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .environment import SWITCH
from .slurm import slurm_job

# A variable for other schedulers: a name of the job that is the same whenever the job is started again.
JOB = "LOOPWRIGHT_JOB"


@dataclass(frozen=True)
class Attempt:
    """One of the attempts that a scheduler or an agent makes at a job.

    Attributes:
        job: a name that all attempts at this job have, and no other job.
        restarts: how many attempts came before; None if whoever names the job does not tell.
    """

    job: str
    restarts: int | None

    @property
    def is_first(self) -> bool:
        """Whether nothing has been done for this job before."""
        return self.restarts == 0


def this_attempt(env: Mapping[str, str] = os.environ) -> Attempt | None:
    """Return which attempt at which job this process is part of; None where nobody starts it again.

    Args:
        env: the environment variables. The count of torchelastic's agents may differ between machines, so that the
            main process's counts.
    """
    if env.get(SWITCH) == "off":
        return None
    restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    if name := env.get(JOB):
        return Attempt(name, None)
    slurm = slurm_job(env)
    if slurm is not None and not slurm.interactive:
        cluster = env.get("SLURM_CLUSTER_NAME", "slurm")
        return Attempt(f"{cluster} {slurm.name}", slurm.restarts + restarts)
    run = env.get("TORCHELASTIC_RUN_ID", "none")
    # The name that torchrun gives to all jobs.
    if run == "none":
        return None
    return Attempt(f"torchelastic {run}", restarts)
