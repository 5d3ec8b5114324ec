"""What is on its way: names and journals of files that are not finished, and what becomes of them after a crash."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import socket
import time
import uuid

from ..errors import CheckpointError
from .manifest import MANIFEST, read_manifest
from .storage import (
    exists,
    is_file,
    is_local,
    join,
    list_names,
    read_bytes,
    remove,
    remove_files,
    write_file,
)

# What is there for a while only: the name that it is for, and the process that made it; the last part is replacing's.
_UNFINISHED = re.compile(
    r"\.(?P<name>.+)\.(?P<place>[^.]+-\d+)-(?P<process>\d+)\.[0-9a-f]{8}\.(tmp|old)(\.[0-9a-f]{8}\.tmp)?",
    re.DOTALL,
)


_FORGOTTEN = (
    7 * 86400.0
)  # seconds after which what another machine has not finished is taken for abandoned


def own_files(path: str) -> list[str]:
    """The files of the checkpoint in a folder; none if there is no checkpoint."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return []
    return [
        MANIFEST,
        *(
            f"{manifest.get('folder', '')}/{name}".lstrip("/")
            for name in manifest["files"]
        ),
    ]


def hidden_name(path: str, kind: str) -> str:
    """A name beside ``path`` for what is there for a while only; it says which process made it."""
    parent, name = os.path.split(path)
    return join(parent, f".{name}.{_owner()}.{uuid.uuid4().hex[:8]}.{kind}")


def _journals_of(path: str) -> str:
    """How the journals of changes to a folder begin: inside a local one, as the one around it may be read-only."""
    parent, _, name = path.rpartition("/")
    inside = is_local(path) or parent.endswith(":/")  # a bucket has nothing around it
    return join(path if inside else parent, f".{name}.")


def write_journal(path: str, names: list[str]) -> str:
    """Note that these files are ours, whatever happens next."""
    journal = f"{_journals_of(path)}{_owner()}.{uuid.uuid4().hex[:8]}.tmp"
    write_file(journal, json.dumps(names).encode())
    return journal


def settle(path: str, journal: str) -> None:
    """Remove those of the files that a journal lists which are no part of the checkpoint that is there now."""
    remove_files(path, {*json.loads(read_bytes(journal))} - {*own_files(path)})
    remove(journal)


def settle_journals(path: str) -> None:
    """Clear up what changes to a folder have left that broke off."""
    folder, _, beginning = _journals_of(path).rpartition("/")
    for name in list_names(folder) if exists(folder) else []:
        found = _UNFINISHED.fullmatch(name)
        if (
            found is None
            or f".{found['name']}." != beginning
            or not is_file(join(folder, name))
        ):
            continue
        if _is_at_work(found["place"], found["process"]):
            continue
        try:
            settle(path, join(folder, name))
        except ValueError:  # it broke off while it was written, and nothing came after
            remove(join(folder, name))
        if is_local(path):
            remove_files(
                path, fnmatch.filter(list_names(path), f"{MANIFEST}.????????.tmp")
            )


def _owner() -> str:
    """This process, in the names of what is not finished: its machine or container, and its number there."""
    namespace = (
        os.stat("/proc/self/ns/pid").st_ino
        if os.path.exists("/proc/self/ns/pid")
        else 0
    )
    return f"{socket.gethostname()}-{namespace}-{os.getpid()}".replace(".", "_")


def name_of_hidden(hidden: str) -> str:
    """``name`` of ``.name.owner.number.tmp`` or ``.old``."""
    return hidden[1:].rsplit(".", 3)[0]


def sweep(directory: str) -> None:
    """Remove what saves of processes that are gone have left unfinished in a local folder."""
    for name in os.listdir(directory):
        found = _UNFINISHED.fullmatch(name)
        if found is None:
            continue
        path = join(directory, name)
        try:
            if (
                found["place"] != _owner().rpartition("-")[0]
            ):  # nobody here knows whether it lives
                gone = time.time() - os.path.getmtime(path) > _FORGOTTEN
            else:
                gone = int(found["process"]) != os.getpid() and not _lives(
                    int(found["process"])
                )
        except OSError:  # another process was quicker
            continue
        if gone and (name.endswith(".tmp") or exists(join(directory, found["name"]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_at_work(place: str, process: str) -> bool:
    """Whether that is another process of this machine, and lives."""
    return (
        place == _owner().rpartition("-")[0]
        and int(process) != os.getpid()
        and _lives(int(process))
    )


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True
