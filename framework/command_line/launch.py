"""``loopwright launch``: a program in several processes, under torchelastic's agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .accelerate_config import read_config
from .options import (
    REFUSED,
    make_parser,
    options_by_name,
    split_arguments,
    variables_of,
)

if TYPE_CHECKING:
    from ...strategies.launch.agent import Nodes

_PORT = 29500


class Job(NamedTuple):
    """What is to be run.

    Attributes:
        command: a program and its arguments.
        processes: how many on this machine.
        nodes: the machines.
        max_restarts: how often all processes are started again.
        variables: for the environment of the processes.
    """

    command: list[str]
    processes: int
    nodes: Nodes
    max_restarts: int
    variables: dict[str, str]


def main(arguments: list[str]) -> int:
    """Run ``loopwright launch``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: that of the process which failed first, 128 + the number of a signal, or 0.
    """
    job = read_job(arguments)
    os.environ.update(job.variables)
    from ...strategies.launch.launcher import run_in_processes

    return run_in_processes(job.command, job.processes, job.max_restarts, job.nodes)


def read_job(arguments: Sequence[str]) -> Job:
    """Make a job of a command line; ends the program where that asks for nothing that can be served.

    Args:
        arguments: those after the command's name.
    """
    parser = make_parser()
    own, program = split_arguments(arguments, parser.error, options_by_name(), REFUSED)
    options = parser.parse_args(own)
    if options.config_file is not None:
        options, ignored = read_config(options.config_file, options, parser)
        if ignored:
            _say(f"{options.config_file}: no effect here: {', '.join(sorted(ignored))}")
    if options.gpu_ids == "all":
        options.gpu_ids = None
    command = _command(program, options, parser)
    least, num_nodes = _number_of_nodes(options.nnodes, parser)
    if least < num_nodes and options.num_processes is not None:
        parser.error(
            f"--num_processes counts all machines, whose number may change with --nnodes {options.nnodes}: "
            "pass --processes, those of each machine"
        )
    processes = _processes_here(options, num_nodes, parser)
    # This imports torch, which takes seconds: what is wrong with the options has been told by now, if it could be.
    from ...strategies.launch.environment import COMMAND, SWITCH

    if os.environ.get(SWITCH) == "off":
        parser.error(
            f"{SWITCH}=off makes every process run by itself: unset it, or start the program with python"
        )
    nodes = _nodes(options, least, num_nodes, parser)
    variables = {COMMAND: "loopwright launch", **variables_of(options)}
    return Job(command, processes, nodes, options.max_restarts or 0, variables)


def _command(
    program: list[str], options: Namespace, parser: ArgumentParser
) -> list[str]:
    """Return what each process runs, after a look whether it is there."""
    if not program:
        parser.error("name a program to start")
    name, *arguments = program
    if options.no_python:
        if options.module:
            parser.error("--module and --no_python exclude each other")
        if shutil.which(name) is None:
            parser.error(f"there is no program {name!r}")
        return program
    # Flags such as -X dev, which this Python was started with.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    python = [sys.executable, *flags, "-u"]
    if options.module:
        return [*python, "-m", name, *arguments]
    if not os.path.exists(name):
        parser.error(f"there is no file {name!r}")
    return [*python, name, *arguments]


def _number_of_nodes(text: str | None, parser: ArgumentParser) -> tuple[int, int]:
    """Return the least and the greatest number of machines."""
    first, _, second = (text or "1").partition(":")
    numbers = [
        int(part) if part.isdecimal() else 0 for part in (first, second or first)
    ]
    least, most = numbers
    if not 1 <= least <= most:
        parser.error(
            f"--nnodes must be an integer from 1, or least:most, such as 1:4; got {text!r}"
        )
    return least, most


def _processes_here(options: Namespace, num_nodes: int, parser: ArgumentParser) -> int:
    """Return the number of processes on this machine."""
    total = options.num_processes
    here = options.processes
    if total is not None:
        if total % num_nodes:
            parser.error(
                f"--num_processes {total} counts all machines, and cannot be divided by {num_nodes} of them"
            )
        if here is not None and here != total // num_nodes:
            parser.error(
                f"--num_processes {total} on {num_nodes} machines contradicts --processes {here}"
            )
        return total // num_nodes
    if isinstance(here, int):
        return here
    if here == "cpu":
        return os.cpu_count() or 1
    return _accelerators(options, here or "auto", parser)


def _accelerators(options: Namespace, asked: str, parser: ArgumentParser) -> int:
    """Return the number of accelerators of this machine; 1 if there is none and none is asked for."""
    if options.cpu:
        return 1
    if options.gpu_ids:
        return len(options.gpu_ids.split(","))
    import torch

    count = torch.accelerator.device_count()
    if asked == "gpu" and not count:
        parser.error("--processes gpu: torch finds no accelerator here")
    if count:
        _say(f"{count} processes, one for each accelerator")
    else:
        _say("one process, as torch finds no accelerator; --processes asks for more")
    return max(1, count)


def _nodes(
    options: Namespace, least: int, num_nodes: int, parser: ArgumentParser
) -> Nodes:
    """Return how this machine meets the others."""
    from ...strategies.launch.agent import Nodes

    if num_nodes == 1:
        _name_needless(options)
        return Nodes()
    rank = options.node_rank
    settings = _settings(options.rdzv_conf, parser)
    backend = options.rdzv_backend or ("c10d" if options.rdzv_endpoint else "static")
    endpoint = options.rdzv_endpoint
    if backend not in ("c10d", "static"):
        parser.error(f"--rdzv-backend must be c10d or static; got {backend!r}")
    if endpoint is None:
        if options.master_addr is None:
            parser.error(
                f"--nnodes {num_nodes} needs --rdzv-endpoint host:port, or --master_addr and --node_rank"
            )
        endpoint = f"{options.master_addr}:{options.master_port or _PORT}"
    if backend == "static":
        if rank is None or rank >= num_nodes:
            parser.error(
                f"--node_rank must be an integer from 0 to {num_nodes - 1}, another on each machine; got {rank}"
            )
        if options.max_restarts:
            parser.error(
                "--max_restarts on several machines needs --rdzv-backend c10d with --rdzv-endpoint host:port"
            )
        if least < num_nodes:
            parser.error(
                f"--nnodes {options.nnodes} needs --rdzv-backend c10d with --rdzv-endpoint host:port"
            )
        settings["rank"] = rank
    job = options.rdzv_id or "none"
    return Nodes(num_nodes, backend, endpoint, job, settings, least, options.local_addr)


def _settings(text: str | None, parser: ArgumentParser) -> dict[str, str]:
    """Read ``key=value,key=value``."""
    settings: dict[str, str] = {}
    for pair in (text or "").split(","):
        key, equals, value = pair.partition("=")
        if pair and not equals:
            parser.error(f"--rdzv-conf must be key=value,key=value; got {text!r}")
        if pair:
            settings[key.strip()] = value.strip()
    return settings


def _name_needless(options: Namespace) -> None:
    """Say which options have no effect on a single machine, where a free port is found by itself."""
    names = (
        "master_addr",
        "master_port",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "rdzv_conf",
        "local_addr",
    )
    needless = [name for name in names if getattr(options, name) is not None]
    if needless:
        _say(
            f"no effect on one machine, whose processes meet at a free port: {', '.join(needless)}"
        )
    if options.node_rank:
        _say(f"node_rank {options.node_rank} has no effect on one machine")


def _say(text: str) -> None:
    print(f"loopwright launch: {text}", file=sys.stderr)
