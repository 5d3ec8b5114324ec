"""Folders that a run has for itself while it lives: two that save in one would mix up their checkpoints."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import Any

from ..messages import log
from .storage import is_local, join, remove, write_file

try:
    import fcntl
except ImportError:  # there are no such locks on Windows
    fcntl = None

# How often to make a folder that its last holder removes meanwhile; what cannot be made at all fails as often.
_TRIES = 1000

# By folder, in this process, where runs in several threads may come and go.
_owners: dict[str, Any] = {}
_descriptors: dict[str, int] = {}
_made: set[str] = set()  # folders that were not there before


def claim_folder(path: str, owner: object) -> str:
    """Make a folder to save in, and see that it can be written to.

    Args:
        path: the folder.
        owner: what has it from now on, and may claim it again.

    Returns:
        ``path``, or a folder inside of it if another owner has that, or another process: one that lives, as what
        holds it is a lock that the system takes away with the process. At a URL there are none.

    Raises:
        OSError: if nothing can be written there.
    """
    if not is_local(path):
        trial = join(path, f".{os.getpid()}.trial")
        write_file(trial, b"")
        with suppress(Exception):  # a store may let nobody delete
            remove(trial)
        return path
    number, claimed = 0, path
    while not _hold(claimed, owner):
        number += 1
        claimed = join(path, f"v{number}")
    if number:
        log.warning("%s is in use by another run: this one saves in %s", path, claimed)
    return claimed


def release_folders(owner: object) -> None:
    """Let others have the folders that ``owner`` has claimed; those that were made for it and are empty go."""
    for path, holder in list(_owners.items()):
        if holder is not owner:
            continue
        is_new = path in _made
        _made.discard(path)
        descriptor = _descriptors.pop(path)
        del _owners[path]
        if is_new:
            with suppress(OSError):
                os.rmdir(path)
        os.close(descriptor)  # only now another can have it


def _hold(path: str, owner: object) -> bool:
    """Lock a folder; False if another has it."""
    holder = _owners.get(path)
    if holder is not None:
        return holder is owner
    is_new = not os.path.exists(path)
    descriptor = _lock(path)
    if descriptor is None:
        return False
    _descriptors[path] = descriptor
    if is_new:
        _made.add(path)
    _owners[path] = owner
    return True


def _lock(path: str) -> int | None:
    """Make a folder and lock it; None if another has it."""
    missing: OSError = FileNotFoundError(path)
    for _ in range(_TRIES):
        descriptor = None
        try:
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(
                dir=path
            ).close()  # raises if it cannot be written to
            descriptor = os.open(path, os.O_RDONLY)
            _try_lock(descriptor)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            assert descriptor is not None, "only a lock is waited for"
            os.close(descriptor)
            return None
        except (FileExistsError, FileNotFoundError) as error:
            missing = error
        # The run that had it has ended just now, and removed it, as it was empty: make it again.
        if descriptor is not None:
            os.close(descriptor)
    raise missing


def _try_lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks, as some on the network
        pass


def _forget() -> None:
    """In a process that was forked, such as a loader's worker: the lock is its parent's, and must end with that."""
    for descriptor in _descriptors.values():
        os.close(descriptor)
    for own in (_owners, _descriptors, _made):
        own.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
