"""Processes of this machine: which ones an agent has started, and whether they still run."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

# Which of the numbers that follow a process's state has its flags, and the one that says that it ends (PF_EXITING).
_FLAGS = 5
_EXITING = 4


def find_peers() -> frozenset[int]:
    """Return the ids of the processes that torchelastic started here, with this one's; none if they are not certain."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not os.path.exists("/proc/self/stat"):
        return frozenset()
    command = _command(os.getpid())
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    siblings = filter(_is_sibling, processes)
    peers = frozenset(process for process in siblings if _command(process) == command)
    # It may be another number if a shell stands between the agent and a process, or if one has changed its title.
    expected = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return peers if len(peers) == expected else frozenset()


def one_is_gone(peers: frozenset[int]) -> bool:
    """Whether one of the processes has ended: then torchelastic ends the others by SIGTERM."""
    return not all(_is_sibling(process) for process in peers)


def process_here() -> tuple[str, int]:
    """Return this process for :func:`has_ended`: its machine (or container), and its id there."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}", os.getpid()
    return "", os.getpid()


def has_ended(process: Sequence[Any] | None) -> bool:
    """Whether a process that :func:`process_here` told is known to have ended; on another machine, it is not."""
    machine, process_id = process or ("", 0)
    if not machine or machine != process_here()[0]:
        return False
    try:
        state, *numbers = status_of(process_id)
    except OSError:
        return True
    # While it ends, its connections are closed before it is a zombie.
    return state == "Z" or int(numbers[_FLAGS]) & _EXITING != 0


def die_with(process: int) -> None:
    """Let the system (Linux) kill this process when its parent dies.

    Args:
        process: the parent's id.
    """
    if sys.platform != "linux":
        return
    import ctypes

    # 1 is PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != process:
        # The parent died before the system was told.
        os.kill(os.getpid(), signal.SIGKILL)


def _is_sibling(process: int) -> bool:
    """Whether a process runs that has this one's parent."""
    try:
        state, parent, *_ = status_of(process)
    except OSError:
        return False
    return int(parent) == os.getppid() and state != "Z"


def status_of(process: int) -> list[str]:
    """Return what the system (Linux) tells of a process, from its state on: "Z" if it has ended; its parent follows.

    The numbers are those of ``/proc/PID/stat`` in proc(5), from the third one on.

    Raises:
        OSError: if there is no such process.
    """
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
        # They stand behind the program's name in brackets, in which there may be spaces and brackets.
        return file.read().rpartition(")")[2].split()


def _command(process: int) -> bytes:
    """Return a process's command line without digits, as the processes of one agent may differ in numbers."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return re.sub(rb"\d", b"", file.read())
    except OSError:
        # The process has just ended.
        return b""
