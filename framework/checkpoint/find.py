"""Which checkpoints there are, and what pointers point to: small files that name a checkpoint, and links to one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError
from .journal import name_of_hidden
from .manifest import MANIFEST, Manifest, is_complete, read_manifest
from .storage import is_local, join, storage_of, without_local_scheme
from .weights import is_weights_file
from .zip_comment import LONGEST_END, comment_in

# In bytes; a pointer is never longer.
_LONGEST_POINTER = 1 << 16
# The end of a checkpoint's name, of what a run has taken back: one that only its path finds.
TAKEN_BACK = ".taken-back"


def resolve(path: str) -> str:
    """The checkpoint, a directory or a file, that ``path`` is or points to.

    Raises:
        CheckpointError: if there is none.
    """
    path = without_local_scheme(os.fspath(path))
    storage = storage_of(path)
    if not storage.exists(path):
        moved = _moved_aside(path)
        if moved is None:
            raise CheckpointError(f"there is no checkpoint at {path!r}")
        return moved
    if not storage.is_file(path):
        return path.rstrip("/")
    if storage.is_local and os.path.islink(path):
        path = os.path.realpath(path)
    if is_weights_file(path):
        return path
    target = pointed_to(path)
    if target is None:
        raise CheckpointError(
            f"{path!r} is neither a checkpoint directory, nor a pointer to one, nor a file of weights (damaged?)"
        )
    if not os.path.isabs(target) and is_local(target):
        target = join(os.path.dirname(path), target)
    if not storage_of(target).exists(target):
        return _moved_aside(target) or target
    return target


def _moved_aside(path: str) -> str | None:
    """The checkpoint that was at ``path``, if a process was killed after moving it aside to put a new one there."""
    parent, name = os.path.split(path.rstrip("/"))
    parent = parent or "."
    if not is_local(path) or not os.path.isdir(parent):
        return None
    for hidden in os.listdir(parent):
        if hidden.startswith(f".{name}.") and hidden.endswith(".old"):
            moved = os.path.join(parent, hidden)
            if is_complete(moved):
                return moved
    return None


def is_pointer(path: str) -> bool:
    """Whether ``path`` names a checkpoint, and is none."""
    storage = storage_of(path)
    if storage.is_local and os.path.islink(path):
        return storage.is_file(path)
    return storage.is_file(path) and pointed_to(path) is not None


def pointed_to(path: str) -> str | None:
    """What the pointer ``path`` names; None if it is another file."""
    content = storage_of(path).read_at_most(path, _LONGEST_POINTER)
    try:
        target = json.loads(content)["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return target if isinstance(target, str) else None


def find_manifests(
    directory: str,
    on_damage: Callable[[str], Any] = lambda _: None,
    endings: tuple[str, ...] = (".ckpt",),
) -> dict[str, Manifest]:
    """The manifests of the complete checkpoints in a directory and its folders, by path.

    Args:
        directory: where to look, local or any fsspec URL.
        on_damage: called, with what is wrong, for each that has no valid manifest; of other damage, only reading the
            files tells.
        endings: of the names of checkpoints that are files.
    """
    storage = storage_of(directory)
    manifests = {}
    if not storage.exists(directory):
        return manifests
    # A folder with a state and without a manifest is damaged, which is to be told.
    found = storage.folders_with(directory, (MANIFEST, "state.json"))
    folders = {folder for folder in found if not folder.endswith(TAKEN_BACK)}
    for path in [*folders, *storage.files_ending(directory, endings)]:
        parent, _, name = path.rpartition("/")
        if parent in folders and not storage.exists(join(path, MANIFEST)):
            # These are the files of the checkpoint around it, whose manifest names this folder.
            continue
        replaced = name_of_hidden(name)
        if replaced is not None:
            # One that was moved aside counts only while nothing has taken its place.
            is_replaced = storage.exists(join(parent, replaced))
            if is_replaced or not name.endswith(".old"):
                continue
        try:
            if path in folders or _is_archive(path):
                manifests[path] = read_manifest(path)
        except CheckpointError as error:
            on_damage(str(error))
        except OSError as error:
            if not storage.is_local:
                # A store that does not answer now is not one without checkpoints.
                raise
            on_damage(f"checkpoint {path!r} cannot be read: {error}")
    return manifests


def _is_archive(path: str) -> bool:
    """Whether a file is one of ``torch.save``, be it damaged at its beginning or its end."""
    end = storage_of(path).read_end(path, LONGEST_END)
    return bool(end) and (comment_in(end) is not None or is_weights_file(path))


def newest_first(manifests: dict[str, Manifest]) -> list[str]:
    """The paths of checkpoints, the one written last first."""
    return sorted(
        manifests,
        key=lambda path: (manifests[path].get("created", 0.0), path),
        reverse=True,
    )


def find_checkpoints(directory: str) -> list[str]:
    """The complete checkpoints in a directory and its folders, the one written last first."""
    return newest_first(find_manifests(directory))


def is_taken(path: str) -> bool:
    """Whether there is something at ``path`` that a new checkpoint must not replace unless that is asked for."""
    storage = storage_of(path)
    if storage.is_local:
        return storage.exists(path)
    # Anything else is what an interrupted upload has left.
    return storage.is_file(path) or storage.exists(join(path, MANIFEST))
