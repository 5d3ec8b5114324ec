"""``loopwright submit``: write what starts a program on a cluster, and start it if asked to."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from typing import NamedTuple

from ..options import (
    Option,
    add_options,
    at_least,
    options_by_name,
    split_arguments,
)
from .job import Job, gigabytes, time_limit, variable, volume

OPTIONS = (
    Option(("--slurm",), "write a batch script for SLURM", None),
    Option(("--kubernetes",), "write a manifest for Kubernetes", None),
    Option(("--ray",), "write a program for Ray Train", None),
    Option(("--run",), "submit it as well", None),
    Option(("--output",), "the file to write; - prints it; default: by the job's name"),
    Option(("--force",), "overwrite the file, if it is there", None),
    Option(("--name", "--job-name"), "of the job; default: by the program"),
    Option(
        ("--nodes", "--nnodes", "--num-machines"), "machines; default: 1", at_least(1)
    ),
    Option(
        ("--devices", "--nproc-per-node", "--processes"),
        "GPUs on each machine, with a process each; default: 1",
        at_least(1),
    ),
    Option(("--cpu", "--use-cpu"), "use CPU cores in the place of GPUs", None),
    Option(
        ("--cpus-per-device", "--cpus-per-task"),
        "CPU cores for each process",
        at_least(1),
    ),
    Option(("--memory", "--mem"), "of each machine, such as 64G", gigabytes),
    Option(
        ("--time", "--time-limit"),
        "how long it may run, as SLURM writes it, such as 1-12:00:00",
        time_limit,
    ),
    Option(
        ("--max-restarts",),
        "how often all processes are started again when one fails; default: 0",
        at_least(0),
    ),
    Option(
        ("--env",),
        "NAME=value, an environment variable; may be repeated",
        variable,
        repeated=True,
    ),
    Option(("--image", "--container-image"), "of a container"),
    Option(("--workdir", "--chdir"), "where the program runs"),
    Option(
        ("--python",), "the interpreter; default: this one under SLURM, else python"
    ),
    Option(("--module", "-m"), "the program is a module, as in python -m", None),
    Option(("--partition",), "SLURM's"),
    Option(("--account",), "SLURM's"),
    Option(
        ("--sbatch",),
        "a further option of sbatch, such as --sbatch=--array=0-3; may be repeated",
        repeated=True,
    ),
    Option(
        ("--kind",),
        "pytorchjob (the default) or jobset",
        choices=("pytorchjob", "jobset"),
    ),
    Option(("--namespace",), "Kubernetes'"),
    Option(
        ("--volume",),
        "claim:/path, a PersistentVolumeClaim and where it is mounted; may be repeated",
        volume,
        repeated=True,
    ),
)

# Options that only some clusters have something for, and what to do on the others.
_ONLY: dict[str, tuple[str, ...]] = {
    "partition": ("slurm",),
    "account": ("slurm",),
    "sbatch": ("slurm",),
    "kind": ("kubernetes",),
    "namespace": ("kubernetes",),
    "volume": ("kubernetes",),
    "python": ("slurm", "kubernetes"),
    "time": ("slurm", "kubernetes"),
    "memory": ("slurm", "kubernetes"),
}
_CLUSTERS = ("slurm", "kubernetes", "ray")
_ENDINGS = {"slurm": ".sbatch", "kubernetes": ".yaml", "ray": "_ray.py"}


class Submission(NamedTuple):
    """What is to be written, and how it is submitted.

    Attributes:
        text: of the file.
        file: its path; "-" for standard output.
        command: submits it.
    """

    text: str
    file: str
    command: list[str]


def main(arguments: list[str]) -> int:
    """Run ``loopwright submit``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: that of what submits the file, if that was asked for.
    """
    parser = _parser()
    own, program = split_arguments(
        arguments, parser.error, options_by_name(OPTIONS), {}
    )
    options = parser.parse_args(own)
    submission = _submission(options, program, parser)
    if submission.file == "-":
        if options.run:
            parser.error("--run needs a file to submit: --output - only prints it")
        print(submission.text, end="")
        return 0
    _write(submission, bool(options.force), parser)
    if not options.run:
        print(
            f"wrote {submission.file}; to submit it:\n  {shlex.join(submission.command)}"
        )
        return 0
    if shutil.which(submission.command[0]) is None:
        parser.error(
            f"--run: there is no program {submission.command[0]!r} here; {submission.file} is written"
        )
    return subprocess.run(submission.command).returncode


def _submission(
    options: Namespace, program: list[str], parser: ArgumentParser
) -> Submission:
    """Make the file's text."""
    asked = [name for name in _CLUSTERS if getattr(options, name)]
    if len(asked) != 1:
        parser.error("name one of --slurm, --kubernetes and --ray")
    cluster = asked[0]
    for name, clusters in _ONLY.items():
        if getattr(options, name) and cluster not in clusters:
            others = " and ".join(f"--{other}" for other in clusters)
            parser.error(
                f"--{name} has an effect with {others} only, not with --{cluster}"
            )
    job = _job(options, cluster, program, parser)
    file = options.output or job.name + _ENDINGS[cluster]
    if cluster == "slurm":
        from .slurm import batch_script

        return Submission(batch_script(job), file, ["sbatch", file])
    if cluster == "kubernetes":
        from .kubernetes import manifest

        return Submission(manifest(job), file, ["kubectl", "apply", "-f", file])
    from .ray_train import ray_program

    submit = ["ray", "job", "submit", "--working-dir", ".", "--", "python", file]
    return Submission(ray_program(job), file, submit)


def _job(
    options: Namespace, cluster: str, program: list[str], parser: ArgumentParser
) -> Job:
    """Make a job of what was asked for."""
    _check_program(options, cluster, program, parser)
    name = options.name or _default_name(program[0], bool(options.module))
    if "\n" in name or "/" in name:
        parser.error(f"--name must be one line without a slash; got {name!r}")
    if cluster == "kubernetes":
        _check_kubernetes(options, name, parser)
    is_in_image = cluster == "kubernetes" or options.image
    python = "python" if is_in_image else sys.executable
    return Job(
        name=name,
        program=program,
        is_module=bool(options.module),
        python=options.python or python,
        nodes=options.nodes,
        devices=options.devices,
        cpu=bool(options.cpu),
        cpus_per_device=options.cpus_per_device,
        memory=options.memory,
        seconds=options.time,
        max_restarts=options.max_restarts,
        env=dict(options.env),
        image=options.image,
        workdir=options.workdir,
        partition=options.partition,
        account=options.account,
        further=_further(options.sbatch, parser),
        kind=options.kind or "pytorchjob",
        namespace=options.namespace,
        volumes=options.volume,
    )


def _check_program(
    options: Namespace, cluster: str, program: list[str], parser: ArgumentParser
) -> None:
    """End the program unless there is one to start; that of a container is in its image."""
    if not program:
        parser.error("name a program to start")
    is_in_image = cluster == "kubernetes" or (cluster == "slurm" and options.image)
    file = os.path.join(options.workdir or ".", program[0])
    if not is_in_image and not options.module and not os.path.exists(file):
        parser.error(f"there is no file {program[0]!r}")


def _default_name(program: str, is_module: bool) -> str:
    """The program's name without folders and ending, in letters that all clusters take."""
    stem = program.rpartition(".")[2]
    if not is_module:
        stem = os.path.splitext(os.path.basename(program))[0]
    plain = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    return plain or "train"


def _further(lines: list[str], parser: ArgumentParser) -> list[str]:
    for line in lines:
        if "\n" in line or not line.startswith("-"):
            parser.error(
                f"--sbatch must be an option of sbatch, such as --sbatch=--exclusive; got {line!r}"
            )
    return lines


def _check_kubernetes(options: Namespace, name: str, parser: ArgumentParser) -> None:
    """End the program unless a manifest can be made."""
    if not options.image:
        parser.error(
            "--kubernetes needs --image: the container image with the program and loopwright in it"
        )
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        parser.error(
            "--name must be at most 40 lower-case letters, digits and hyphens for Kubernetes, with a letter first and "
            f"no hyphen last; got {name!r}"
        )


def _write(submission: Submission, force: bool, parser: ArgumentParser) -> None:
    """Write the file; ends the program if it is there, or cannot be written."""
    file = submission.file
    try:
        with open(file, "w" if force else "x", encoding="utf-8") as opened:
            opened.write(submission.text)
    except FileExistsError:
        parser.error(
            f"{file} is there already: --force overwrites it, --output names another file"
        )
    except OSError as error:
        parser.error(f"--output: {file} cannot be written: {error}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="loopwright submit",
        usage="loopwright submit --slurm|--kubernetes|--ray [options] program.py [its arguments]",
        description="Write the file that starts a program on a cluster, and print the command that submits it. Options "
        "may be spelled with underscores, too.",
        allow_abbrev=False,
    )
    add_options(parser, OPTIONS)
    parser.set_defaults(
        nodes=1, devices=1, max_restarts=0, env=[], sbatch=[], volume=[]
    )
    return parser
