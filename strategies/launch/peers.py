"""The processes of a job on one machine, as they know of each other: whether one has ended, and where it was last seen.

Each process notes its place in a file in memory (Linux). The others open that while it lives, so that it outlives it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from .processes import has_ended

_NAME = "loopwright-place"
# So much of a place is read, in bytes.
_MOST_BYTES = 10_000


class Peer:
    """A process of the job on this machine, which lives when this is made.

    Args:
        process: what :func:`~.processes.process_here` gave there.
        place_file: what :func:`place_file` gave there.

    Attributes:
        pid: the process.
    """

    def __init__(self, process: Sequence[Any], place_file: str) -> None:
        self._process = process
        self.pid: int = process[1]
        self._file = _open(place_file)

    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return has_ended(self._process)

    def last_place(self) -> str:
        """Return where it was last seen, in words; empty if it is not known."""
        if self._file is None:
            return ""
        noted = os.pread(self._file, _MOST_BYTES, 0)
        # The rest of a longer one may follow.
        return noted.partition(b"\n")[0].decode(errors="replace")


def note_place(place: str) -> None:
    """Note for the others where this process is, in words."""
    file = _own_file(os.getpid())
    if file is not None:
        with suppress(OSError):
            os.pwrite(file, f"{place}\n".encode(), 0)


def place_file() -> str:
    """Return where the others find this process's place; empty if they do not."""
    process = os.getpid()
    file = _own_file(process)
    return "" if file is None else f"/proc/{process}/fd/{file}"


# They stay open for as long as this process lives, as the processes of a job know each other for that long.


@cache
def _own_file(process: int) -> int | None:
    """Make the file of this process, of which a fork has another one."""
    if sys.platform == "linux":
        # No run fails as there is no room for it.
        with suppress(OSError):
            return os.memfd_create(_NAME)
    return None


@cache
def _open(path: str) -> int | None:
    # In another container, the number may be that of another process.
    with suppress(OSError):
        if _NAME in os.readlink(path):
            return os.open(path, os.O_RDONLY)
    return None
