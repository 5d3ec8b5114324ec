"""Let glibc keep the memory that a step on the CPU lets go, for the next step takes it again.

By default, glibc hands the free end of its heap back to the system, and each large block at once. A training step frees
nearly all that it took; in the next one, the system has to find and clear the same pages again, one page fault for each
4 kB. With the settings below, blocks of up to 32 MB lie in the heap, which is not cut. Larger blocks still go back at
once: in the heap, the gaps that they leave would add to the memory that is taken at most.

glibc reads variables of the environment when a process starts (mallopt(3)): those that we start get them. In a process
that others have started, :func:`keep_freed_memory` sets the same as a run begins.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from .machine import free_in_container

# A variable with which users switch this: "on" (the default), "all", or "off".
MALLOC = "LOOPWRIGHT_MALLOC"

_MB = 2**20
# By mallopt's numbers (malloc.h), the values: bytes, of which -1 means that the heap is never cut, and at last a
# number of blocks. For glibc, 32 MB is the most that the second may be.
_ON = {-1: -1, -3: 32 * _MB}
# Nothing goes back, as no block has pages of its own.
_ALL = {-1: -1, -4: 0}
_VARIABLES = {
    -1: "MALLOC_TRIM_THRESHOLD_",
    -2: "MALLOC_TOP_PAD_",
    -3: "MALLOC_MMAP_THRESHOLD_",
    -4: "MALLOC_MMAP_MAX_",
}
# So much of a container's memory has to be free for each process.
_LEAST_FREE = 1024 * _MB


def add_to_environment(environment: MutableMapping[str, str], processes: int) -> None:
    """Set glibc's variables for processes that are to be started, unless the user has set one, or memory is scarce.

    Args:
        environment: theirs.
        processes: how many.

    Raises:
        ValueError: if ``LOOPWRIGHT_MALLOC`` is none of its values.
    """
    settings = _settings(environment)
    if not settings or not _is_glibc() or _is_scarce(settings, processes):
        return
    environment.update(_variables(settings))


def keep_freed_memory(processes: int = 1) -> str:
    """Let this process keep the memory that it frees; if it does already, nothing changes.

    Args:
        processes: how many of a job run on this machine.

    Returns:
        Why it does not, where that is worth a line; else an empty text.

    Raises:
        ValueError: if ``LOOPWRIGHT_MALLOC`` is none of its values.
    """
    settings = _settings(os.environ)
    if not settings or not _is_glibc() or _has_other_malloc():
        return ""
    if _variables(settings).items() <= os.environ.items():
        # Whoever has started this process has set them.
        return ""
    if _is_scarce(settings, processes):
        return (
            "Memory that a step frees goes back to the system, which costs time, as less than 1 GiB of the container's "
            f"memory is free for each process; {MALLOC}=all keeps it even so"
        )
    mallopt = ctypes.CDLL(None).mallopt
    for number, value in settings.items():
        mallopt(number, value)
    return ""


def _settings(environment: Mapping[str, str]) -> dict[int, int]:
    """Return what to set; nothing if the user has set something of it, or wants nothing set."""
    choices = {"on": _ON, "all": _ALL, "off": {}}
    choice = environment.get(MALLOC) or "on"
    if choice not in choices:
        raise ValueError(f'{MALLOC} must be "on", "all" or "off"; got {choice!r}')
    settings = choices[choice]
    ours = _variables(settings)
    for name in _VARIABLES.values():
        if name in environment and environment[name] != ours.get(name):
            return {}
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return {}
    return settings


def _variables(settings: Mapping[int, int]) -> dict[str, str]:
    """Return settings as variables of the environment."""
    # Those are read without a sign.
    return {
        _VARIABLES[number]: str(value % 2**64) for number, value in settings.items()
    }


def _is_glibc() -> bool:
    """Whether the C library is the GNU one; macOS, Windows and musl have others."""
    if sys.platform != "linux":
        return False
    with suppress(ValueError, OSError):
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    return False


def _has_other_malloc() -> bool:
    """Whether another library, loaded before, has taken the place of glibc's malloc: it keeps memory by itself."""
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:
        text = file.read()
        names = ("libjemalloc", "libtcmalloc", "libmimalloc")
        return any(name in text for name in names)
    return False


def _is_scarce(settings: Mapping[int, int], processes: int) -> bool:
    """Whether a container's limit is near, so that nothing is to be kept but by the user's word."""
    free = free_in_container()
    return settings is _ON and free is not None and free < processes * _LEAST_FREE
