"""The locks of torch's extension builds: a process that is killed leaves its lock, for which torch waits forever."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from glob import escape, glob

# A lock that nobody holds here may be held on another machine, unless nothing beside it has changed for so long.
_OTHER_MACHINE_SECONDS = 300.0

log = logging.getLogger("loopwright")


def await_builds() -> None:
    """Wait until nobody builds an extension for torch, and take away the locks of builds that were killed.

    A lock is a file that its maker keeps open. One that no process of this machine has open is left over, or belongs
    to a machine with the same home folder: it is respected until nothing beside it has changed for five minutes.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        pattern = os.path.join(escape(root), "*", "lock")
    else:
        pattern = os.path.join(escape(get_default_build_root()), "*", "*", "lock")
    for lock in glob(pattern):
        try:
            _await_build(lock)
        except FileNotFoundError:
            # It has been released.
            continue
        except OSError as error:
            # It is another user's lock, and this run may not need that build.
            log.warning(
                "%s seems to be left over from a build that was killed, and cannot be removed: %s",
                lock,
                error,
            )


def _await_build(lock: str) -> None:
    """Wait for the build that holds a lock, and remove the lock if there is none.

    Raises:
        FileNotFoundError: if the lock is released meanwhile.
        OSError: if it cannot be removed.
    """
    is_announced = False
    # The age is looked at last: if another process has made the lock anew since the first look, it is young.
    # One of far in the future was made before the clock was set back.
    while _is_held(lock) or abs(_age_seconds(lock)) < _OTHER_MACHINE_SECONDS:
        if not is_announced:
            log.info(
                "Waiting for the build of an extension by another process: %s", lock
            )
            is_announced = True
        time.sleep(0.5)
    os.remove(lock)


def _age_seconds(lock: str) -> float:
    """Return the seconds since a lock, or something beside it, was changed last.

    Raises:
        FileNotFoundError: if there is no such file any more.
    """
    newest = os.stat(lock).st_mtime
    for entry in os.scandir(os.path.dirname(lock)):
        # A compiler's temporary file may have gone meanwhile.
        with suppress(FileNotFoundError):
            newest = max(newest, entry.stat().st_mtime)
    return time.time() - newest


def _is_held(lock: str) -> bool:
    """Whether a process of this machine has a file open; taken to be so where the system does not tell.

    Raises:
        FileNotFoundError: if there is no such file any more.
    """
    lock_stat = os.stat(lock)
    if not os.path.isdir("/proc/self/fd"):
        return True
    for descriptor in glob("/proc/[0-9]*/fd/*"):
        # It may have been closed meanwhile, or be another user's.
        with suppress(OSError):
            if os.path.samestat(os.stat(descriptor), lock_stat):
                return True
    return False
