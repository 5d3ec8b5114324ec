"""The folder in which the processes of a job leave what their agent reads; it goes with the agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import process
from typing import Any

# A socket's path may have 107 characters, and multiprocessing adds a name to that of the folder.
_LONGEST = 85
# Waits until the process that has started it is gone, however it ended, and removes the folder that it is given. What
# still writes there is killed at that moment, so it tries again.
_REMOVE = """read line
for second in 1 2 3; do rm -rf "$0" && exit; sleep 1; done"""


@contextmanager
def job_folder() -> Iterator[str]:
    """Return a context with a new folder, which is removed at its end, and when this process is killed."""
    folder = tempfile.mkdtemp(prefix="loopwright_")
    remover = _start_remover(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if remover is not None:
            # What was forked meanwhile may hold its pipe, too, so that it would wait.
            remover.kill()
            remover.communicate()


def _start_remover(folder: str) -> subprocess.Popen[bytes] | None:
    """Start what removes a folder when this process is killed; None where there is no shell."""
    if os.name != "posix":
        return None
    with suppress(OSError):
        return subprocess.Popen(
            ("/bin/sh", "-c", _REMOVE, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return None


def keep_sockets_in(folder: str) -> None:
    """Let multiprocessing keep the sockets of this process's workers in a job's folder: a worker may be killed."""
    made = tempfile.mkdtemp(prefix="pymp-", dir=folder)
    if len(made) <= _LONGEST:
        # Workers take over this setting, which Python does not document.
        current: Any = process.current_process()
        current._config.setdefault("tempdir", made)
