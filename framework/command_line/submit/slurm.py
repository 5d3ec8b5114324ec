"""A batch script for SLURM."""

from __future__ import annotations

import shlex

from .job import Job

_TASKS = """\
# One process for each device. SIGUSR1 comes to them before the time is up: then they save, and the job goes back into
# the queue. Started again, it goes on by itself."""
_AGENTS = """\
# On each machine, a process that starts those of the devices, and starts all again when one fails. SIGUSR1 comes before
# the time is up: then they save, and the job goes back into the queue. Started again, it goes on by itself."""
_MEET = """\
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((15000 + SLURM_JOB_ID % 10000))"""
# Inside of a container, there is no scontrol.
_REQUEUE = """\
code=$?
# 138: the processes have ended for SIGUSR1. There is no scontrol in their container.
if [ "$code" = 138 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code\""""


def batch_script(job: Job) -> str:
    """Return the script."""
    lines = ["#!/bin/bash", *_directives(job), ""]
    for name, value in job.env.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    if job.env:
        lines.append("")
    if job.max_restarts:
        lines += [_AGENTS, *([_MEET] if job.nodes > 1 else []), _with_agents(job)]
    else:
        lines += [_TASKS, shlex.join([*_srun(job), *job.command])]
    if job.image:
        lines.append(_REQUEUE)
    return "\n".join(lines) + "\n"


def _directives(job: Job) -> list[str]:
    """The script's lines for SLURM."""
    tasks = 1 if job.max_restarts else job.devices
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
    }
    if not job.cpu:
        options["gpus-per-node"] = job.devices
    if cpus := _cpus_per_task(job):
        options["cpus-per-task"] = cpus
    if job.memory:
        options["mem"] = f"{job.memory}G"
    if job.seconds:
        options["time"] = _time(job.seconds)
    options["partition"] = job.partition
    options["account"] = job.account
    options["chdir"] = job.workdir
    options["signal"] = f"SIGUSR1@{job.signal_seconds}"
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    # What a job that is started again prints stands in the same file, below.
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    return [*lines, *(f"#SBATCH {text}" for text in job.further)]


def _srun(job: Job) -> list[str]:
    # What ends one task ends the others.
    command = ["srun", "--kill-on-bad-exit=1"]
    if cpus := _cpus_per_task(job):
        # srun does not take it over from the batch script.
        command.append(f"--cpus-per-task={cpus}")
    if job.image:
        command.append(f"--container-image={job.image}")
    return command


def _with_agents(job: Job) -> str:
    """The line that starts a launcher on each machine."""
    if job.nodes == 1:
        return shlex.join([*_srun(job), *job.launcher()])
    meet = ("--nnodes", str(job.nodes), "--rdzv-id", "JOB", "--rdzv-endpoint", "FIRST")
    words = [*_srun(job), *job.launcher(*meet)]
    quoted = [shlex.quote(word) for word in words]
    place = words.index("--rdzv-id")
    quoted[place + 1] = '"$SLURM_JOB_ID-$SLURM_RESTART_COUNT"'
    quoted[place + 3] = '"$first:$port"'
    return " ".join(quoted)


def _cpus_per_task(job: Job) -> int | None:
    if job.cpus_per_device is None:
        return None
    return job.cpus_per_device * (job.devices if job.max_restarts else 1)


def _time(seconds: int) -> str:
    # SLURM counts in minutes.
    minutes = -(-seconds // 60)
    days, minutes = divmod(minutes, 24 * 60)
    return f"{days}-{minutes // 60:02}:{minutes % 60:02}:00"
