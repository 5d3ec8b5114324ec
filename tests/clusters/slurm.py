"""SLURM, with two machines that are one: ``python -m tests.clusters.slurm [SCENE …]``."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clusters.program import NUM_STEPS
from tests.clusters.scenes import (
    PROGRAM,
    CannotRunError,
    Stage,
    end_processes_with,
    finish,
    free_port,
    install,
    play,
    require_root,
    stop,
    wait_until,
)

# Without accounting, without cgroups, and with a scheduler that does not rest. A requeued job waits until the
# credentials of its last start are not valid any more: two minutes, unless `cred_expire` says otherwise.
CONFIG = """\
ClusterName=loopwright
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=1
KillWait=30
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# States of a job that does not go on by itself.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

TASKS = ("--nodes=2", "--ntasks-per-node=1")


class Slurm:
    """A cluster that runs.

    Args:
        folder: where its files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: Any) -> str:
        """Run one of SLURM's commands, and return what it prints."""
        done = subprocess.run(
            [*map(str, command)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        stage: Stage,
        *arguments: Any,
        options: Sequence[str] = TASKS,
        otherwise: str = "exit 1",
    ) -> str:
        """Submit a job that trains; returns its number.

        Args:
            stage: the scene's.
            arguments: the program's.
            options: of sbatch.
            otherwise: what the batch script does when the training fails.
        """
        script = stage.folder / "job.sh"
        arguments = (*PROGRAM, stage.folder, "--fresh", *arguments)
        command = " ".join(map(str, arguments))
        script.write_text(f"#!/bin/sh\nsrun {command} || {otherwise}\n")
        files = (f"--output={stage.output}", "--open-mode=append", "--parsable")
        stage.environment["SLURM_CONF"] = self.environment["SLURM_CONF"]
        done = subprocess.run(
            ["sbatch", "--requeue", *files, *options, script],
            env=stage.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        number = done.stdout.strip()
        stage.has_ended = lambda: self.job(number)["JobState"] in ENDED
        return number

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        items = [item.partition("=") for item in text.split()]
        return {name: value for name, _, value in items}

    def wait_for(self, job: str, *states: str, seconds: float = 180) -> None:
        """Wait until a job is in one of the states."""
        wait_until(
            lambda: self.job(job)["JobState"] in states,
            f"job {job} is {' or '.join(states)}",
            seconds,
        )

    def wait_for_restart(self, job: str, number: int = 1) -> None:
        """Wait until a job has been put back into the queue so many times."""
        wait_until(
            lambda: int(self.job(job)["Restarts"]) >= number,
            f"job {job} is put back into the queue",
            120,
        )

    def check_completed(self, job: str, restarts: int) -> None:
        """Wait for a job's end; fail unless it has succeeded after so many restarts."""
        self.wait_for(job, *ENDED)
        facts = self.job(job)
        found = (facts["JobState"], int(facts["Restarts"]))
        assert found == ("COMPLETED", restarts), f"job {job}: {found}"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, as processes of this one, and stop them at the end."""
    require_root()
    commands = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
    install(commands, ("slurm-wlm", "munge", "util-linux"))
    slurm = Slurm(folder)
    _configure(folder)
    # The names of the machines are known to their daemons, and to what these start.
    machine = f"mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N "
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _start(slurm, daemons, "munged", "--foreground", "--force", *_munge(folder))
        wait_until((folder / "munge.socket").exists, "munged answers", 20)
        _start(slurm, daemons, "slurmctld", "-D")
        for name in ("n1", "n2"):
            _start(slurm, daemons, "unshare", "--mount", "sh", "-c", machine + name)
        idle = ("sinfo", "--noheader", "--format=%T")
        wait_until(lambda: _is_answered(slurm, *idle), "both machines are idle", 60)
        yield slurm
    finally:
        stop(daemons)
        # What a job that was not waited for has left.
        conf = slurm.environment["SLURM_CONF"]
        end_processes_with("SLURM_CONF", conf, 1)


def _configure(folder: Path) -> None:
    """Write what the daemons read."""
    text = CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        folder=folder,
        ports=[free_port() for _ in range(3)],
        # The processes of a job meet at a port that its number gives.
        first_job=random.randrange(1000, 50_000),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "hosts").write_text(
        Path("/etc/hosts").read_text() + "\n127.0.0.1 n1 n2\n"
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    (folder / "state").mkdir()


def _munge(folder: Path) -> list[str]:
    return [
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munge.seed",
    ]


def _start(slurm: Slurm, daemons: list[Any], *command: str) -> None:
    with (slurm.folder / f"{command[0]}.out").open("ab") as output:
        daemon = subprocess.Popen(
            command, env=slurm.environment, stdout=output, stderr=output
        )
    daemons.append(daemon)
    time.sleep(0.3)
    if daemon.poll() is not None:
        text = (slurm.folder / f"{command[0]}.out").read_text()
        raise CannotRunError(f"{command[0]} does not start: {text[-300:]}")


def _is_answered(slurm: Slurm, *command: str) -> bool:
    done = subprocess.run(
        command, env=slurm.environment, capture_output=True, text=True
    )
    return done.stdout.split() == ["idle"]


def train(slurm: Slurm, stage: Stage) -> None:
    job = slurm.submit(stage)
    slurm.check_completed(job, restarts=0)
    stage.check_whole()
    assert "2 processes launched by SLURM's srun" in stage.text()


def exception_on_rank_1(slurm: Slurm, stage: Stage) -> None:
    job = slurm.submit(stage, "--fail-at", 12)
    slurm.wait_for(job, *ENDED)
    assert slurm.job(job)["JobState"] == "FAILED"
    assert slurm.job(job)["ExitCode"] == "1:0"
    text = stage.text()
    assert "Rank 1 of 2 failed at" in text
    assert "ValueError: the batch is not to my liking" in text
    assert "in on_train_batch_start" in text


def begin_slowly(slurm: Slurm, stage: Stage, pause: float = 0.2, **options: Any) -> str:
    """Submit a job, and wait until it is well into its first epoch, between two checkpoints."""
    stage.pause(pause)
    job = slurm.submit(stage, **options)
    stage.wait_for_step(8)
    return job


def check_one_run(slurm: Slurm, stage: Stage, job: str, restarts: int = 1) -> None:
    """Let a job go on to its end; fail unless nothing was trained twice, and all is as if nothing had happened."""
    stage.pause(0)
    slurm.check_completed(job, restarts)
    assert stage.steps() == [*range(NUM_STEPS)], stage.steps()
    stage.check_whole()


def signal_and_time_limit(slurm: Slurm, stage: Stage) -> None:
    # Two jobs beside each other. SLURM looks at limits twice a minute, and may send its signal 30 s early.
    signalled = stage.beside("signalled")
    limits = (["--time=1"], ["--time=3", "--signal=SIGUSR1@60"])
    jobs = []
    for each, limit in zip((stage, signalled), limits, strict=True):
        each.pause(3)
        jobs.append(slurm.submit(each, options=[*TASKS, *limit]))
    begun_again: set[str] = set()

    def both_have_begun_again() -> bool:
        for each, job in zip((stage, signalled), jobs, strict=True):
            if job not in begun_again and slurm.job(job)["Restarts"] == "1":
                each.pause(0)
                # The second attempt is to have no limit that it could reach.
                limit = ("timelimit=30", f"jobid={job}")
                slurm.run("scontrol", "update", *limit)
                begun_again.add(job)
        return len(begun_again) == 2

    wait_until(both_have_begun_again, "both jobs are put back into the queue", 240)
    check_one_run(slurm, stage, jobs[0])
    check_one_run(slurm, signalled, jobs[1])
    assert "is about to end by its time limit" in stage.text()
    assert "SIGUSR1 at step" in signalled.text()
    assert "is about to end by its time limit" not in signalled.text()


def requeue_by_hand(slurm: Slurm, stage: Stage) -> None:
    job = begin_slowly(slurm, stage)
    slurm.run("scontrol", "requeue", job)
    check_one_run(slurm, stage, job)


def scancel(slurm: Slurm, stage: Stage) -> None:
    job = begin_slowly(slurm, stage)
    slurm.run("scancel", job)
    slurm.wait_for(job, *ENDED)
    wait_until(lambda: not stage.processes(), "the processes have ended", 40)
    saved = f"step={max(stage.steps()) + 1}.ckpt"
    assert saved in stage.text(), f"{saved} is not said to be saved"
    # A job that was put back would be pending again.
    time.sleep(2)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"


def machine_set_down(slurm: Slurm, stage: Stage) -> None:
    job = begin_slowly(slurm, stage)
    down = ("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.run(*down)
    try:
        slurm.wait_for(job, "PENDING", "REQUEUED")
        wait_until(lambda: not stage.processes(), "the processes have ended", 40)
        stage.pause(0)
    finally:
        slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    slurm.check_completed(job, restarts=1)
    # The machine is gone, as far as SLURM knows: whether it lets the job save first is its affair.
    assert min(stage.steps()[9:]) >= 5, f"not resumed: {stage.steps()}"
    stage.check_whole()


def task_of_an_array(slurm: Slurm, stage: Stage) -> None:
    # Two tasks with the same program, which find their folders by their numbers.
    tasks = [stage, stage.beside("1")]
    tasks[1].pause(0.2)
    stage.pause(0.2)
    options = ("--nodes=1", "--ntasks=1", "--array=0-1")
    job = slurm.submit(stage, "--subfolder-of-array-task", options=options)
    for task in tasks:
        task.wait_for_step(8)
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    slurm.wait_for_restart(f"{job}_1")
    for task in tasks:
        task.pause(0)
    slurm.check_completed(f"{job}_0", restarts=0)
    slurm.check_completed(f"{job}_1", restarts=1)
    for task in tasks:
        assert task.steps() == [*range(2 * NUM_STEPS)], task.steps()
    assert tasks[0].weights() == tasks[1].weights()
    assert tasks[0].curve() == tasks[1].curve()


def killed_and_stopped_ranks(slurm: Slurm, stage: Stage) -> None:
    again = 'scontrol requeue "$SLURM_JOB_ID"'
    stage.pause(0.2)
    job = slurm.submit(stage, "--hang-timeout", 10, otherwise=again)
    strikes = (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)
    for number, strike in enumerate(strikes):
        stage.wait_for_step(8 + 9 * number)
        os.kill(stage.rank(random.randrange(2)), strike)
        slurm.wait_for_restart(job, number + 1)
    stage.pause(0)
    slurm.check_completed(job, restarts=3)
    # Checkpoints are five steps apart, and the last one may have been on its way.
    assert len(stage.steps()) < NUM_STEPS + 3 * 10, stage.steps()
    stage.check_whole()


SCENES = (
    train,
    exception_on_rank_1,
    signal_and_time_limit,
    requeue_by_hand,
    scancel,
    machine_set_down,
    task_of_an_array,
    killed_and_stopped_ranks,
)


if __name__ == "__main__":
    sys.exit(finish(play("SLURM", cluster, SCENES, *sys.argv[1:])))
