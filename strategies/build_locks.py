"""The locks under which torch builds extensions: who is killed meanwhile leaves one, and torch waits for it forever."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from glob import glob

_OTHER_MACHINE = 120.0  # seconds for which one that nobody holds here may be held on another machine


def await_builds() -> None:
    """Wait until nobody builds an extension for torch, and take away the locks of builds that were killed.

    A lock is a file that its maker keeps open. One that no process of this machine has open is left over, or belongs
    to a machine with the same home folder: it counts for two minutes.
    """
    from torch.utils.cpp_extension import get_default_build_root

    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = os.path.join(own, "*") if own else os.path.join(get_default_build_root(), "*", "*")
    for lock in glob(os.path.join(folders, "lock")):
        told = False
        with suppress(FileNotFoundError):  # it has been released
            while _is_held(lock) or time.time() - os.stat(lock).st_mtime < _OTHER_MACHINE:
                if not told:
                    logging.getLogger("loopwright").info("Waiting for the build of an extension by another: %s", lock)
                told = True
                time.sleep(0.1)
            os.remove(lock)


def _is_held(lock: str) -> bool:
    """Whether a process of this machine has a file open; taken to be so where the system does not tell.

    Raises:
        FileNotFoundError: if there is no such file any more.
    """
    found = os.stat(lock)
    if not os.path.isdir("/proc/self/fd"):
        return True
    for descriptor in glob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # it has been closed meanwhile, or is another user's
            if os.path.samestat(os.stat(descriptor), found):
                return True
    return False
