"""The locks under which torch builds extensions: who is killed meanwhile leaves one, and torch waits for it forever."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from glob import escape, glob

_OTHER_MACHINE = 300.0  # seconds without any change for which one that nobody holds here may be held on another machine

log = logging.getLogger("loopwright")


def await_builds() -> None:
    """Wait until nobody builds an extension for torch, and take away the locks of builds that were killed.

    A lock is a file that its maker keeps open. One that no process of this machine has open is left over, or belongs
    to a machine with the same home folder: it is respected until nothing beside it has changed for five minutes.
    """
    from torch.utils.cpp_extension import get_default_build_root

    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = (
        (escape(own), "*") if own else (escape(get_default_build_root()), "*", "*")
    )
    for lock in glob(os.path.join(*folders, "lock")):
        told = False
        try:
            # Its age is asked for last, as another process may have made it anew meanwhile.
            while _is_held(lock) or _age(lock) < _OTHER_MACHINE:
                if not told:
                    log.info(
                        "Waiting for the build of an extension by another process: %s",
                        lock,
                    )
                told = True
                time.sleep(0.5)
            os.remove(lock)
        except FileNotFoundError:  # it has been released
            pass
        except (
            OSError
        ) as error:  # another user's, of whose builds this run may need none
            log.warning(
                "%s seems to be left over from a build that was killed, and cannot be removed: %s",
                lock,
                error,
            )


def _age(lock: str) -> float:
    """Seconds since a lock, or something beside it, was changed last.

    Raises:
        FileNotFoundError: if there is no such file any more.
    """
    newest = os.stat(lock).st_mtime
    for entry in os.scandir(os.path.dirname(lock)):
        with suppress(FileNotFoundError):  # a compiler's own, which has gone
            newest = max(newest, entry.stat().st_mtime)
    return time.time() - newest


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
