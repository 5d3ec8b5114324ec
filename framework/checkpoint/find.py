"""Which checkpoints there are, and what pointers point to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError
from .journal import name_of_hidden
from .manifest import MANIFEST, is_complete, read_manifest
from .storage import (
    exists,
    find_folders_with,
    is_file,
    is_local,
    join,
    plain,
    read_bytes,
)
from .weights import is_weights_file


def _replaced(path: str) -> str | None:
    """The complete checkpoint that was moved aside, if the process was killed before the new one took its place."""
    parent, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(parent or "."):
        return None
    aside = [
        other
        for other in os.listdir(parent or ".")
        if other.startswith(f".{name}.") and other.endswith(".old")
    ]
    return next(
        (found for other in aside if is_complete(found := os.path.join(parent, other))),
        None,
    )


def resolve(path: str) -> str:
    """The checkpoint, a directory or a file of weights, that ``path`` is or points to.

    Raises:
        CheckpointError: if there is none.
    """
    path = plain(os.fspath(path))
    if (
        not exists(path)
        and is_local(path)
        and (replaced := _replaced(path)) is not None
    ):
        return replaced
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint at {path!r}")
    if not is_file(path):
        return path.rstrip("/")
    if is_weights_file(path):
        return path
    target = pointed_to(path)
    if target is None:
        raise CheckpointError(
            f"{path!r} is neither a checkpoint directory, nor a pointer to one, nor a file of weights (damaged?)"
        )
    target = (
        target
        if os.path.isabs(target) or "://" in target
        else join(os.path.dirname(path), target)
    )
    if not exists(target) and is_local(target):
        return _replaced(target) or target
    return target


def pointed_to(path: str) -> str | None:
    """What the pointer ``path`` names; None if it is another file."""
    try:
        target = json.loads(read_bytes(path, limit=1 << 16))["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return target if isinstance(target, str) else None


def find_manifests(
    directory: str, damaged: Callable[[str], Any] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """The manifests of the complete checkpoints in a directory and its folders, by path.

    ``damaged`` is told of each that has no valid manifest; of other damage, only reading them tells.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (
        folders := set(find_folders_with(directory, (MANIFEST, "state.json")))
    ):
        parent, name = path.rpartition("/")[::2]
        if parent in folders and not exists(join(path, MANIFEST)):
            continue  # where the files of one are that has replaced another
        # One moved aside counts only while nothing has taken its place.
        if name.startswith(".") and (
            not name.endswith(".old") or exists(join(parent, name_of_hidden(name)))
        ):
            continue
        try:
            found[path] = read_manifest(path)
        except CheckpointError as error:
            damaged(str(error))
        except OSError as error:
            if not is_local(path):
                raise  # a store that does not answer now is not one without checkpoints
            damaged(f"checkpoint {path!r} cannot be read: {error}")
    return found


def find_checkpoints(directory: str) -> list[str]:
    """The complete checkpoints in a directory and its folders, the one written last first."""
    found = find_manifests(directory)
    return sorted(
        found, key=lambda path: (found[path].get("created", 0.0), path), reverse=True
    )


def is_taken(path: str) -> bool:
    """Whether there is something at ``path`` that a new checkpoint must not take the place of unasked."""
    if is_local(path):
        return exists(path)
    return is_file(path) or exists(
        join(path, MANIFEST)
    )  # else it is what an interrupted upload has left
