"""The folder in which the processes of a job leave what their agent reads, and those of agents that were killed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from glob import escape, glob

from .processes import has_ended, process_here


def make_job_folder() -> str:
    """Make a folder whose name tells this process, and remove those that killed agents of this machine have left.

    Of other users' and other containers' agents nobody here can tell whether they run: their folders stay.
    """
    machine, process_id = process_here()
    # A host's name may hold anything, and be long.
    place = hashlib.sha256(machine.encode()).hexdigest()[:12]
    beginning = f"loopwright_{place}_"
    if machine:
        pattern = os.path.join(escape(tempfile.gettempdir()), f"{beginning}*_*")
        for folder in glob(pattern):
            owner = os.path.basename(folder).removeprefix(beginning).partition("_")[0]
            if owner.isdecimal() and has_ended((machine, int(owner))):
                _remove_own(folder)
    return tempfile.mkdtemp(prefix=f"{beginning}{process_id}_")


def _remove_own(folder: str) -> None:
    # Another launch may have removed it just now.
    with suppress(OSError):
        # A system may hide the processes of other users, so that they seem to have ended.
        if os.lstat(folder).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
