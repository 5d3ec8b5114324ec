"""Open MPI's mpirun: ``python -m tests.clusters.mpi [SCENE …]``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clusters.scenes import PROGRAM, Stage, finish, install, play

# mpirun refuses root, and more processes than it thinks that the machine has room for.
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", 2)


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """See that mpirun is there: nothing has to run for it."""
    install(["mpirun"], ["openmpi-bin"])
    yield


def start(stage: Stage, *arguments: Any) -> subprocess.Popen[bytes]:
    """Start a job that trains in two processes."""
    return stage.start(*MPIRUN, *PROGRAM, stage.folder, *arguments)


def train(cluster: None, stage: Stage) -> None:
    assert start(stage).wait(120) == 0
    stage.check_whole()
    assert "2 processes launched by MPI" in stage.text()


def exception_on_rank_1(cluster: None, stage: Stage) -> None:
    assert start(stage, "--fail-at", 12).wait(120) == 1
    text = stage.text()
    assert "Rank 1 of 2 failed at" in text
    assert "ValueError: the batch is not to my liking" in text
    assert "in on_train_batch_start" in text


def killed_rank(cluster: None, stage: Stage) -> None:
    stage.pause(0.2)
    job = start(stage)
    stage.wait_for_step(8)
    os.kill(stage.rank(1), signal.SIGKILL)
    assert job.wait(30) != 0
    # What is resumed is what a job that nothing has happened to would have trained.
    stage.pause(0)
    assert start(stage).wait(120) == 0
    stage.check_whole()


def terminated_job(cluster: None, stage: Stage) -> None:
    stage.pause(0.2)
    job = start(stage)
    stage.wait_for_step(8)
    job.terminate()
    assert job.wait(30) != 0
    assert not stage.left_running()


SCENES = (train, exception_on_rank_1, killed_rank, terminated_job)


if __name__ == "__main__":
    sys.exit(finish(play("Open MPI", cluster, SCENES, *sys.argv[1:])))
