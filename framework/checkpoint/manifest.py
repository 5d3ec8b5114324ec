"""The manifest of a checkpoint: the file that is written last, and makes the others count."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError
from .storage import (
    is_file,
    join,
    read_bytes,
    size,
)

FORMAT = 1


MANIFEST = "manifest.json"


_LARGEST_MANIFEST = 2**28  # bytes; a file that is larger was made to fill the memory


def seal_manifest(body: dict[str, Any]) -> bytes:
    """The file's content, with a checksum."""
    return _dump({"body": body, "crc32": zlib.crc32(_dump(body))})


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it was altered, or is of a later format.
    """
    name = join(path, MANIFEST)
    if not is_file(name):  # to open a pipe would wait for somebody to write
        raise CheckpointError(
            f"{path!r} is no complete checkpoint: {MANIFEST} is missing, or no file"
        )
    content = read_bytes(name, limit=_LARGEST_MANIFEST)
    with naming_damage(path, f"{MANIFEST} was altered or truncated"):
        sealed = json.loads(content)
        body = sealed["body"]
        if _dump(sealed) != content or zlib.crc32(_dump(body)) != sealed["crc32"]:
            raise ValueError("its checksum differs")
        later = body["format"] > FORMAT
    if later:
        raise CheckpointError(
            f"checkpoint {path!r} has format {body['format']}, this version reads up to {FORMAT}; upgrade"
        )
    with naming_damage(path, f"{MANIFEST} is not as it should be"):
        for name in [*body["files"], body.get("folder", "files")]:
            if {*name.split("/")} & {"", ".", ".."} or "\\" in name or ":" in name:
                raise ValueError(f"it lists {name!r}, which is no file inside of it")
        if not all(
            type(own[fact]) is int
            for own in body["files"].values()
            for fact in ("size", "crc32")
        ):
            raise TypeError("a file's size or checksum is no number")
        float(body.get("created", 0.0))
        dict(body.get("metrics", {}))
    return body


@contextmanager
def naming_damage(path: str, what: str) -> Iterator[None]:
    """Raise whatever content that is damaged, or was made to harm, makes others raise as a CheckpointError."""
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
    try:
        manifest = read_manifest(path)
        return all(
            size(path_of(path, name, manifest)) == own["size"]
            for name, own in manifest["files"].items()
        )
    except (CheckpointError, OSError):
        return False


def path_of(path: str, name: str, manifest: dict[str, Any]) -> str:
    """Where the file ``name`` of a checkpoint is: below the folder that its manifest names, if it names one."""
    return join(
        path, *(manifest["folder"],) if "folder" in manifest else (), *name.split("/")
    )
