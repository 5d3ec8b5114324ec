"""Ray's cluster on this machine, and Ray Train's TorchTrainer: ``python -m tests.clusters.ray_train [SCENE …]``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clusters.scenes import (
    BUILD,
    MARK,
    ROOT,
    CannotRunError,
    Stage,
    end_processes_with,
    finish,
    free_port,
    play,
    stop,
    wait_until,
)

# Beside the environment, so that Ray and what it brings along are not in the other tests' way.
PACKAGES = BUILD / "ray"


class Ray:
    """A cluster that runs.

    Args:
        address: where it answers.
        environment: of its daemons, and of programs that use it.
    """

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        self.address = address
        self.environment = environment

    def start(self, stage: Stage, *arguments: Any) -> subprocess.Popen[bytes]:
        """Start a program that trains in two workers of the cluster."""
        environment = {**self.environment, MARK: stage.environment[MARK]}
        program = (sys.executable, "-m", "tests.clusters.ray_program", self.address)
        return stage.start(*program, stage.folder, *arguments, env=environment)


@contextmanager
def cluster(folder: Path) -> Iterator[Ray]:
    """Install Ray if need be, start its daemons, as processes of this one, and stop them at the end."""
    _install()
    environment = {
        MARK: uuid.uuid4().hex,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGES)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        # A worker is started when it is needed: on two cores, others would only be in the way.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    port = free_port()
    head = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", "--num-cpus=3", "--include-dashboard=false"),
        *(f"--temp-dir={folder}", f"--object-store-memory={100_000_000}"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
    ]
    with (folder / "output").open("wb") as output:
        daemon = subprocess.Popen(
            head,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        is_up = (folder / "output").read_text
        wait_until(lambda: "Ray runtime started" in is_up(), "Ray is started", 300)
        yield Ray(f"127.0.0.1:{port}", environment)
    except AssertionError:
        print((folder / "output").read_text(), flush=True)
        raise
    finally:
        # It ends those that it has started.
        stop([daemon])
        end_processes_with(MARK, environment[MARK], 10)


def _install() -> None:
    if (PACKAGES / "ray").is_dir():
        return
    install = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"),
        *("--disable-pip-version-check", "--root-user-action=ignore"),
        *("--constraint", str(ROOT / "constraints.txt")),
    ]
    # As a whole or not at all.
    part = PACKAGES.with_name("ray.part")
    shutil.rmtree(part, ignore_errors=True)
    install += ["--target", str(part), "ray[train]>=2.50"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise CannotRunError(f"cannot install ray[train]: {done.stderr[-300:]}")
    part.rename(PACKAGES)


def result_of(stage: Stage) -> dict[str, Any]:
    """What TorchTrainer.fit returned."""
    return json.loads((stage.folder / "result.json").read_text())


def fit_and_report(ray: Ray, stage: Stage) -> None:
    assert ray.start(stage).wait(300) == 0
    stage.check_whole()
    assert "2 processes launched by" in stage.text()
    result = result_of(stage)
    assert result["metrics"]["step"] == 40
    assert result["metrics"]["loss"] == stage.curve()[-1][1]
    assert result["checkpoint"] == 40, "Ray's checkpoint is not the last one"


def exception_on_rank_1(ray: Ray, stage: Stage) -> None:
    assert ray.start(stage, "--fail-at", 12).wait(300) != 0
    text = stage.text()
    assert "ValueError: the batch is not to my liking" in text
    assert "in on_train_batch_start" in text


def killed_worker(ray: Ray, stage: Stage) -> None:
    stage.pause(0.2)
    job = ray.start(stage, "--max-failures", 1)
    # Ray has a checkpoint of step 20.
    stage.wait_for_step(23)
    os.kill(stage.rank(1), signal.SIGKILL)
    stage.pause(0)
    assert job.wait(300) == 0
    steps = stage.steps()
    # From Ray's checkpoint, or a newer one of the run's own.
    assert steps[-15:] == [*range(25, 40)], f"not resumed: {steps}"
    assert len(steps) < 60, f"trained again from the beginning: {steps}"
    stage.check_whole()
    assert result_of(stage)["checkpoint"] == 40


SCENES = (fit_and_report, exception_on_rank_1, killed_worker)


if __name__ == "__main__":
    sys.exit(finish(play("Ray", cluster, SCENES, *sys.argv[1:])))
