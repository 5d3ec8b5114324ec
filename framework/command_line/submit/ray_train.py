"""A program for Ray Train."""

from __future__ import annotations

import json
import os
from typing import Any

from .job import Job

# Braces that are Python's stand doubled.
_PROGRAM = '''\
"""Runs {what} in {workers} workers of Ray Train."""

import os
import runpy
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

PROGRAM = {program}
ARGUMENTS = {arguments}
# On every machine; what is written with a relative path is written here.
FOLDER = {folder}
ENVIRONMENT = {env}


def train(_):
    """Run the program in one worker. Its Trainer joins the others: Ray has set their variables."""
    os.chdir(FOLDER)
    # Workers that are started again go on with the run of this name.
    os.environ["LOOPWRIGHT_JOB"] = {name}
    sys.argv = [PROGRAM, *ARGUMENTS]
    sys.path.insert(0, {path})
    runpy.{run}(PROGRAM, run_name="__main__"{alter})


ray.init(runtime_env={runtime!s})
trainer = TorchTrainer(
    train,
    scaling_config=ScalingConfig(
        num_workers={workers},
        use_gpu={gpu!r},{resources}
    ),
    run_config=RunConfig(
        name={name},
        failure_config=FailureConfig(max_failures={max_restarts}),
    ),
)
trainer.fit()
'''


def _python(value: Any) -> str:
    """Write strings, in a list or a mapping, as Python code."""
    return json.dumps(value, ensure_ascii=False)


def ray_program(job: Job) -> str:
    """Return the program."""
    program, *arguments = job.program
    image = f', "image_uri": {_python(job.image)}' if job.image else ""
    runtime = f'{{"env_vars": ENVIRONMENT{image}}}'
    resources = ""
    if job.cpus_per_device:
        gpu = "" if job.cpu else ', "GPU": 1'
        resources = (
            f'\n        resources_per_worker={{"CPU": {job.cpus_per_device}{gpu}}},'
        )
    return _PROGRAM.format(
        what=program.replace("\\", "\\\\").replace('"', '\\"'),
        workers=job.nodes * job.devices,
        program=_python(program),
        arguments=_python(arguments),
        folder=_python(os.path.abspath(job.workdir or ".")),
        env=_python(dict(job.env)),
        name=_python(job.name),
        path="FOLDER" if job.is_module else "os.path.dirname(os.path.abspath(PROGRAM))",
        run="run_module" if job.is_module else "run_path",
        alter=", alter_sys=True" if job.is_module else "",
        runtime=runtime,
        gpu=not job.cpu,
        resources=resources,
        max_restarts=job.max_restarts,
    )
