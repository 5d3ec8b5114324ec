"""Folders that belong to one running program: two that save in one folder would mix up their checkpoints."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import Any, NamedTuple

from ..messages import log
from .storage import is_local, join, storage_of, write_file

try:
    import fcntl
except ImportError:
    # There are no such locks on Windows.
    fcntl = None

# How often to try to make a folder, as its last holder may remove it meanwhile; then what cannot be made is an error.
_TRIES = 1000


class _Claim(NamedTuple):
    """A folder that is locked.

    Attributes:
        owner: who has it.
        descriptor: of the open folder, which holds the lock.
        is_new: whether the folder was not there before.
    """

    owner: Any
    descriptor: int
    is_new: bool


# This process's claims by folder. Each has an owner, as runs in several threads must not share a folder either.
_claims: dict[str, _Claim] = {}


def claim_folder(path: str, owner: object) -> str:
    """Make a folder to save in that no other run has, and see that it can be written to.

    Args:
        path: the folder.
        owner: who has the folder from now on, and may claim it again.

    Returns:
        ``path``, or a folder inside of it if another owner or process has ``path``. A claim is a lock, which the
        system takes away when the process ends. At a URL there are no claims.

    Raises:
        OSError: if nothing can be written there.
    """
    if not is_local(path):
        trial = join(path, f".{os.getpid()}.trial")
        write_file(trial, b"")
        # A store may let nobody delete.
        with suppress(Exception):
            storage_of(trial).remove(trial)
        return path
    number = 0
    claimed = path
    while not _hold(claimed, owner):
        number += 1
        claimed = join(path, f"v{number}")
    if number:
        log.warning("%s is in use by another run: this one saves in %s", path, claimed)
    return claimed


def release_folders(owner: object) -> None:
    """Give up what ``owner`` has claimed; folders that were made for it and are empty are removed."""
    for path, claim in list(_claims.items()):
        if claim.owner is not owner:
            continue
        del _claims[path]
        if claim.is_new:
            with suppress(OSError):
                os.rmdir(path)
        # The lock ends only now that the folder is gone, so that nobody can have claimed it before.
        os.close(claim.descriptor)


def _hold(path: str, owner: object) -> bool:
    """Lock a folder; False if another has it."""
    claim = _claims.get(path)
    if claim is not None:
        return claim.owner is owner
    is_new = not os.path.exists(path)
    descriptor = _lock(path)
    if descriptor is None:
        return False
    _claims[path] = _Claim(owner, descriptor, is_new)
    return True


def _lock(path: str) -> int | None:
    """Make a folder and lock it; None if another has it."""
    missing: OSError = FileNotFoundError(path)
    for _ in range(_TRIES):
        descriptor = None
        try:
            os.makedirs(path, exist_ok=True)
            # Raises if it cannot be written to.
            tempfile.TemporaryFile(dir=path).close()
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
        # The run that had the folder has ended just now, and removed it, as it was empty: make it again.
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
    except OSError:
        # The file system has no locks, as some on the network.
        pass


def _forget_claims() -> None:
    """Called in a forked process, such as a loader's worker: the locks are its parent's, and must end with that."""
    for claim in _claims.values():
        os.close(claim.descriptor)
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_claims)
