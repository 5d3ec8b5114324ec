"""What is to be run on a cluster, and its checks that hold for all of them."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field

# Before the end of its time, a program is told to save: so many seconds, or this part of a short job's time.
SIGNAL_SECONDS = 120
_SIGNAL_PART = 0.1

# Where the machines of a job meet.
PORT = 29500


@dataclass(frozen=True)
class Job:
    """A program, and what it needs.

    Attributes:
        name: of the job.
        program: the file or module, and its arguments.
        is_module: whether it is a module, as in ``python -m``.
        python: the interpreter.
        nodes: machines.
        devices: processes on each of them, each with a device of its own.
        cpu: the devices are CPU cores, and no GPU is asked for.
        cpus_per_device: CPU cores for each process; None for the cluster's default.
        memory: gigabytes for each machine; None for the cluster's default.
        seconds: how long it may run; None for the cluster's default.
        max_restarts: how often all processes are started again when one fails.
        env: environment variables.
        image: of a container; None for none.
        workdir: where the program runs; None for the default.
        partition: SLURM's.
        account: SLURM's.
        further: lines for SLURM's ``#SBATCH``.
        kind: Kubernetes' kind of resource.
        namespace: Kubernetes'.
        volumes: claims of Kubernetes' volumes, and where each is mounted.
    """

    name: str
    program: list[str]
    is_module: bool = False
    python: str = "python"
    nodes: int = 1
    devices: int = 1
    cpu: bool = False
    cpus_per_device: int | None = None
    memory: int | None = None
    seconds: int | None = None
    max_restarts: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    workdir: str | None = None
    partition: str | None = None
    account: str | None = None
    further: list[str] = field(default_factory=list)
    kind: str = "pytorchjob"
    namespace: str | None = None
    volumes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def command(self) -> list[str]:
        """What each process runs."""
        module = ["-m"] if self.is_module else []
        return [self.python, "-u", *module, *self.program]

    @property
    def signal_seconds(self) -> int:
        """How long before the end of its time the program is told to save."""
        if self.seconds is None:
            return SIGNAL_SECONDS
        return max(1, min(SIGNAL_SECONDS, int(self.seconds * _SIGNAL_PART)))

    def launcher(self, *options: str) -> list[str]:
        """``loopwright launch`` for the processes of a machine.

        Args:
            options: how the machines meet.
        """
        own = ["--processes", str(self.devices), *options]
        if self.max_restarts:
            own += ["--max_restarts", str(self.max_restarts)]
        module = ["--module"] if self.is_module else []
        return [
            self.python,
            "-m",
            "loopwright",
            "launch",
            *own,
            *module,
            "--",
            *self.program,
        ]


def time_limit(text: str) -> int:
    """Read a time as SLURM writes it, into seconds.

    Raises:
        ArgumentTypeError: if it is none.
    """
    days, dash, rest = text.partition("-")
    parts = (rest if dash else text).split(":")
    numbers = [days, *parts] if dash else parts
    if not all(number.isdecimal() for number in numbers) or len(parts) > 3:
        raise ArgumentTypeError(
            f"must be minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]; got {text!r}"
        )
    if dash:
        hours, minutes, seconds = [int(part) for part in [*parts, "0", "0"][:3]]
        total = int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(parts) == 3:
        hours, minutes, seconds = map(int, parts)
        total = hours * 3600 + minutes * 60 + seconds
    else:
        minutes, seconds = [int(part) for part in [*parts, "0"][:2]]
        total = minutes * 60 + seconds
    if not total:
        raise ArgumentTypeError(f"must be more than nothing; got {text!r}")
    return total


def gigabytes(text: str) -> int:
    """Read an amount of memory, such as ``64G``.

    Raises:
        ArgumentTypeError: if it is none.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:G|GB|Gi|GiB)", text)
    if found is None:
        raise ArgumentTypeError(f"must be whole gigabytes, such as 64G; got {text!r}")
    return int(found[1])


def variable(text: str) -> tuple[str, str]:
    """Read ``NAME=value``.

    Raises:
        ArgumentTypeError: if it is none.
    """
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ArgumentTypeError(
            f"must be NAME=value, with letters, digits and _ in the name; got {text!r}"
        )
    return name, value


def volume(text: str) -> tuple[str, str]:
    """Read ``claim:/path``.

    Raises:
        ArgumentTypeError: if it is none.
    """
    claim, _, path = text.partition(":")
    if not claim or not path.startswith("/"):
        raise ArgumentTypeError(
            f"must be the name of a PersistentVolumeClaim and an absolute path, as claim:/path; got {text!r}"
        )
    return claim, path
