"""The manifest of a checkpoint: the file that is written last, and makes the others count; of one file, its end."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from ..errors import CheckpointError
from .storage import join, storage_of
from .zip_comment import LONGEST_END, comment_in, fits

# The version of the schema that is written; earlier ones are read, too.
FORMAT = 2
MANIFEST = "manifest.json"
# What the manifest of a checkpoint in one file calls all that stands before the manifest.
ARCHIVE = "archive"
# In bytes; a file that is larger was made to fill the memory.
_LARGEST_MANIFEST = 2**28


class Manifest(TypedDict):
    """What a manifest says of a checkpoint.

    Attributes:
        format: the version of the schema.
        files: each file's ``size`` in bytes and checksum, ``crc32``.
        folder: where below the checkpoint they are, if not in it itself.
        created: when, in seconds since 1970.
        world_size: of the run.
        module: the class of what was trained.
        metrics: the values that were known.
        epoch: the counter of that name.
        global_step: the counter of that name.
        strategy: its name.
        precision: its name.
        torch: the version that saved it.
        resumable: a Trainer can resume it.
        fit: the name of the fit, by which another attempt at its job finds it.
    """

    format: int
    files: dict[str, dict[str, int]]
    folder: str
    created: float
    world_size: int
    module: str
    metrics: dict[str, float]
    epoch: int
    global_step: int
    strategy: str
    precision: str
    torch: str
    resumable: bool
    fit: str


def seal_manifest(body: Any) -> bytes:
    """The file's content, with a checksum."""
    return _dump({"body": body, "crc32": zlib.crc32(_dump(body))})


def seal_in_file(body: Any, size: int, crc32: int) -> bytes:
    """The manifest that stands at the end of a checkpoint in one file; without logged values if these are too many."""
    body = {**body, "files": {ARCHIVE: {"size": size, "crc32": crc32}}}
    sealed = seal_manifest(body)
    return sealed if fits(sealed) else seal_manifest({**body, "metrics": {}})


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def read_manifest(path: str) -> Manifest:
    """The manifest of a checkpoint, a folder or a file.

    Raises:
        CheckpointError: if there is none, or it was altered, or is of a later format.
    """
    file = join(path, MANIFEST)
    storage = storage_of(path)
    if storage.is_file(path):
        manifest = manifest_in(path, storage.read_end(path, LONGEST_END))
        if manifest is None:
            raise CheckpointError(
                f"{path!r} has no manifest: another program has written it, or torch.save anew; pass its path to use it"
            )
        return manifest
    # A pipe of that name would block: to open one waits for somebody to write.
    if not storage.is_file(file):
        raise CheckpointError(
            f"{path!r} is no complete checkpoint: {MANIFEST} is missing, or no file"
        )
    return _unseal(path, storage.read_at_most(file, _LARGEST_MANIFEST))


def manifest_in(path: str, end: bytes) -> Manifest | None:
    """The manifest at the end of a checkpoint in one file; None if another program has written it.

    Args:
        path: of the file.
        end: all of it, or its last :data:`~.zip_comment.LONGEST_END` bytes.

    Raises:
        CheckpointError: as of :func:`read_manifest`.
    """
    found = comment_in(end[-LONGEST_END:])
    if found is None:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: it was cut off, or its end was altered"
        )
    return _unseal(path, found[0]) if found[0] else None


def _unseal(path: str, content: bytes) -> Manifest:
    with naming_damage(path, f"{MANIFEST} was altered or truncated"):
        sealed = json.loads(content)
        body = sealed["body"]
        if _dump(sealed) != content or zlib.crc32(_dump(body)) != sealed["crc32"]:
            raise ValueError("its checksum differs")
        is_later = body["format"] > FORMAT
    if is_later:
        raise CheckpointError(
            f"checkpoint {path!r} has format {body['format']}, this version reads up to {FORMAT}; upgrade"
        )
    with naming_damage(path, f"{MANIFEST} is not as it should be"):
        _check(body)
    return body


def _check(body: Manifest) -> None:
    """Raise for content that we would not write, as paths outside the checkpoint: a right checksum is easily made."""
    for name in [*body["files"], body.get("folder", "files")]:
        if {*name.split("/")} & {"", ".", ".."} or "\\" in name or ":" in name:
            raise ValueError(f"it lists {name!r}, which is no file inside of it")
    for entry in body["files"].values():
        if type(entry["size"]) is not int or type(entry["crc32"]) is not int:
            raise TypeError("a file's size or checksum is no number")
    float(body.get("created", 0.0))
    dict(body.get("metrics", {}))


@contextmanager
def naming_damage(path: str, what: str) -> Iterator[None]:
    """Turn whatever the block raises into a CheckpointError, as content that is damaged may make it raise anything."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {what} ({type(error).__name__}: {error})"
        ) from error


def is_complete(path: str) -> bool:
    """Whether ``path`` holds a valid manifest and all files that it lists, in their sizes."""
    storage = storage_of(path)
    try:
        manifest = read_manifest(path)
        if storage.is_file(path):
            return True
        for name, entry in manifest["files"].items():
            if storage.size(path_of(path, name, manifest)) != entry["size"]:
                return False
    except (CheckpointError, OSError):
        return False
    return True


def name_in(manifest: Manifest, name: str) -> str:
    """The name of a checkpoint's file below the checkpoint: in the folder that its manifest names, if it names one."""
    return f"{manifest.get('folder', '')}/{name}".lstrip("/")


def path_of(
    path: str,
    name: str,
    manifest: Manifest,
) -> str:
    """Where the file ``name`` of a checkpoint is."""
    return join(path, *name_in(manifest, name).split("/"))
