"""What this machine has, and how much of it this process may use: CPUs, memory, in a container too, and free ports."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

# Where the system shows control groups, and the file that tells those of this process.
_GROUPS = "/sys/fs/cgroup"
_OWN = "/proc/self/cgroup"
# A limit of so many bytes is none.
_NO_LIMIT = 2**60
# Ports that systems do not give to connections, so that a free one is still free seconds later, when it is used.
_PORTS = range(20_000, 32_000)
_MOST_TRIES = 100


@dataclass(frozen=True)
class _Version:
    """Names that a version of control groups has.

    Attributes:
        memory: the controller of memory, of which the name is part of the path; in version 2 there is one tree.
        limit: the file with its limit.
        use: the file with what is in use.
        droppable: in ``memory.stat``, what of that is files' contents, which the system can drop.
        cpu: the controller of CPU time.
    """

    memory: str
    limit: str
    use: str
    droppable: str
    cpu: str


_VERSIONS = (
    _Version("", "memory.max", "memory.current", "inactive_file", ""),
    _Version(
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "cpu",
    ),
)


def usable_cpus(root: str = _GROUPS, own: str = _OWN) -> int:
    """Return how many CPUs this process may use: those that it may run on, or fewer where their time is limited.

    Args:
        root: where the system shows control groups.
        own: the file that tells this process's.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for version in _VERSIONS:
        for folder in _folders(root, version.cpu, own):
            share = _cpu_share(folder)
            if share is not None:
                count = min(count, share)
    return max(count, 1)


def _cpu_share(folder: str) -> int | None:
    """Return to how many CPUs a control group limits its time, rounded up; None without a limit."""
    quota = _number(os.path.join(folder, "cpu.cfs_quota_us"))
    period = _number(os.path.join(folder, "cpu.cfs_period_us"))
    with (
        suppress(OSError, ValueError),
        open(os.path.join(folder, "cpu.max"), encoding="utf-8") as file,
    ):
        # Both in one line; without a limit, the first is "max".
        quota, period = map(int, file.read().split())
    if quota is None or quota <= 0 or not period:
        return None
    return -(-quota // period)


def total_memory() -> int | None:
    """Return the bytes of memory that this machine has; None where the system does not tell."""
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def usable_memory() -> int | None:
    """Return the bytes of memory that this process may have: a container's limit, or those of the machine."""
    sizes = [limit for limit, _ in _limits(_GROUPS, _OWN)]
    total = total_memory()
    if total is not None:
        sizes.append(total)
    return min(sizes, default=None)


def free_in_container(root: str = _GROUPS, own: str = _OWN) -> int | None:
    """Return how many bytes this process's control groups, and those around them, leave free; None without a limit.

    Args:
        root: where the system shows control groups.
        own: the file that tells this process's.
    """
    return min((limit - used for limit, used in _limits(root, own)), default=None)


def _limits(root: str, own: str) -> Iterator[tuple[int, int]]:
    """Give the memory limit of each control group that has one, and what is in use and cannot be dropped."""
    for version in _VERSIONS:
        for folder in _folders(root, version.memory, own):
            # Without a limit, it is "max", or as large as numbers get.
            limit = _number(os.path.join(folder, version.limit))
            if limit is None or limit >= _NO_LIMIT:
                continue
            used = _number(os.path.join(folder, version.use)) or 0
            droppable = _number(os.path.join(folder, "memory.stat"), version.droppable)
            yield limit, used - (droppable or 0)


def _folders(root: str, controller: str, own: str) -> list[str]:
    """Return the folders of this process's control group and of all around it."""
    group = ""
    with suppress(OSError), open(own, encoding="utf-8") as file:
        for line in file:
            # Such as "4:memory:/docker/1f", and in version 2 "0::/user.slice".
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controller in controllers.split(","):
                group = path.strip("/")
    # In a container, the path may be that outside, and its root is what is seen inside.
    folders = [os.path.join(root, controller)]
    for part in filter(None, group.split("/")):
        folders.append(os.path.join(folders[-1], part))
    return folders


def _number(path: str, key: str = "") -> int | None:
    """Read a number from a file: the only one, or that behind ``key``; None if there is none."""
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if not key:
            return int(file.read())
        for line in file:
            name, _, number = line.partition(" ")
            if name == key:
                return int(number)
    return None


def free_port() -> int:
    """A port of this machine on which somebody may listen soon.

    Raises:
        OSError: if all that were tried are in use.
    """
    # The user's seed gives all programs the same numbers.
    draws = random.SystemRandom()
    for _ in range(_MOST_TRIES):
        port = draws.choice(_PORTS)
        if _is_free(port):
            return port
    raise OSError(f"no port of {_PORTS} that was tried is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
