"""Files of a save that is not finished: their names, journals that list them, and what a crash leaves of them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import socket
import time
import uuid
from contextlib import suppress

from ..errors import CheckpointError
from .manifest import MANIFEST, name_in, read_manifest
from .storage import is_local, join, storage_of, write_file

# The names of what is there for a while only: the name that it is for, the machine and the process that made it, and a
# random number. The last part is there while such a file is itself being written.
_UNFINISHED = re.compile(
    r"\.(?P<name>.+)\.(?P<machine>[^.]+-\d+)-(?P<process>\d+)\.[0-9a-f]{8}\.(tmp|old)(\.[0-9a-f]{8}\.tmp)?",
    re.DOTALL,
)
# Seconds after which what another machine has not finished is taken for abandoned.
_ABANDONED_AFTER = 7 * 86400.0


def own_files(path: str) -> list[str]:
    """The files of the checkpoint in a folder; none if there is no checkpoint."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return []
    return [MANIFEST, *(name_in(manifest, name) for name in manifest["files"])]


def hidden_name(path: str, kind: str) -> str:
    """A new name beside ``path`` for what is there for a while only; it says which process made it."""
    parent, name = os.path.split(path)
    return join(parent, f".{name}.{_this_process()}.{uuid.uuid4().hex[:8]}.{kind}")


def name_of_hidden(hidden: str) -> str | None:
    """``name`` of ``.name.process.number.tmp`` or ``.old``; None for other names, which may begin with a dot, too."""
    match = _UNFINISHED.fullmatch(hidden)
    return None if match is None else match["name"]


def _this_machine() -> str:
    """This machine or container, in the names of what is not finished."""
    # Containers may share a host name, but each numbers its processes by itself.
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except FileNotFoundError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}".replace(".", "_")


def _this_process() -> str:
    return f"{_this_machine()}-{os.getpid()}"


def _is_alive(process: int) -> bool:
    """Whether a process of this machine is there that is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is there, but another user's.
        pass
    return True


def _journals_of(path: str) -> str:
    """How the paths of a folder's journals begin: inside it if it is local, as the one around it may be read-only."""
    parent, _, name = path.rpartition("/")
    # A bucket has nothing around it.
    is_inside = is_local(path) or parent.endswith(":/")
    return join(path if is_inside else parent, f".{name}.")


def write_journal(path: str, names: list[str]) -> str:
    """Note that these files of the folder ``path`` are ours, whatever happens next; returns the journal's path."""
    number = uuid.uuid4().hex[:8]
    journal = f"{_journals_of(path)}{_this_process()}.{number}.tmp"
    write_file(journal, json.dumps(names).encode())
    return journal


def settle(path: str, journal: str) -> None:
    """Remove what a journal lists but what belongs to the checkpoint that is there now, and then the journal."""
    storage = storage_of(path)
    listed = json.loads(storage.read(journal))
    storage.remove_files(path, {*listed} - {*own_files(path)})
    storage.remove(journal)


def settle_journals(path: str) -> None:
    """Clear up what saves that broke off have left in a folder."""
    storage = storage_of(path)
    folder, _, beginning = _journals_of(path).rpartition("/")
    for name in storage.names(folder) if storage.exists(folder) else ():
        match = _UNFINISHED.fullmatch(name)
        journal = join(folder, name)
        if match is None or f".{match['name']}." != beginning:
            continue
        if not storage.is_file(journal):
            continue
        if match["machine"] == _this_machine() and _is_alive(int(match["process"])):
            continue
        try:
            settle(path, journal)
        except ValueError:
            # It broke off while the journal was written, before any of the files.
            storage.remove(journal)
        if storage.is_local:
            unfinished = f"{MANIFEST}.????????.tmp"
            storage.remove_files(path, fnmatch.filter(storage.names(path), unfinished))


def sweep(directory: str) -> None:
    """Remove what saves of processes that are gone have left unfinished in a local folder."""
    for name in os.listdir(directory):
        match = _UNFINISHED.fullmatch(name)
        path = join(directory, name)
        if match is None or not _is_abandoned(path, match):
            continue
        is_file = not os.path.isdir(path)
        if is_file and match["name"] == os.path.basename(os.path.abspath(directory)):
            # The folder's journal: whoever saves into the folder needs it.
            continue
        if name.endswith(".tmp") or os.path.exists(join(directory, match["name"])):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                os.unlink(path)


def _is_abandoned(path: str, match: re.Match[str]) -> bool:
    """Whether the process that made ``path`` is gone, so that nobody will finish it."""
    if match["machine"] == _this_machine():
        process = int(match["process"])
        return process != os.getpid() and not _is_alive(process)
    # Nobody here knows whether that process is alive.
    try:
        return time.time() - os.path.getmtime(path) > _ABANDONED_AFTER
    except OSError:
        # Another process has removed it already.
        return False
