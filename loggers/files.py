"""Files and folders of loggers, on a local disk or any file system of fsspec."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Any


def is_local(path: str) -> bool:
    """Whether a path is local, rather than the URL of another file system."""
    return "://" not in path


def filesystem(path: str) -> Any:
    """The fsspec file system of a path or URL."""
    import fsspec

    # Its listings are not kept: another run's folder would not be seen in them.
    return fsspec.core.url_to_fs(path, use_listings_cache=False)[0]


def exists(path: str) -> bool:
    """Whether a file or folder is at ``path``."""
    return os.path.exists(path) if is_local(path) else filesystem(path).exists(path)


def read_text(path: str) -> str:
    """The whole of a file."""
    if not is_local(path):
        return filesystem(path).cat_file(path).decode()
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    """Write a whole file; a local one is replaced at once, so that an interruption loses nothing."""
    if not is_local(path):
        filesystem(path).pipe_file(path, text.encode())
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)
    except OSError:
        with suppress(OSError):
            os.unlink(f"{path}.tmp")
        raise


def append_text(path: str, text: str) -> None:
    """Append to a local file; where that fails, as on a full disk, the file is as it was before."""
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file of bytes."""
    if not is_local(path):
        filesystem(path).pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def make_folder(path: str) -> bool:
    """Make a folder; return False if it exists already."""
    try:
        if is_local(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            os.mkdir(path)
        else:
            _put_once(filesystem(path), f"{path}/.claimed")
    except FileExistsError:
        return False
    return True


def _put_once(store: Any, path: str) -> None:
    """Put a file where there is none. It claims a folder, as a store has no folders of its own."""
    try:
        store.pipe_file(path, b"1", mode="create")
    except FileExistsError:
        raise
    except Exception:
        # Not every store can refuse to overwrite: at others, two runs that begin at the same moment are not told apart.
        if store.exists(path):
            raise FileExistsError(path) from None
        store.pipe_file(path, b"1")


def absolute(path: str) -> str:
    """The absolute local path, links resolved; a URL as it is."""
    return os.path.realpath(path) if is_local(path) else path


def next_version(root: str) -> int:
    """One more than the highest ``N`` of the folders ``version_N`` in ``root``; 0 if there is none."""
    try:
        if is_local(root):
            names = os.listdir(root)
        else:
            names = filesystem(root).ls(root, detail=False)
    except FileNotFoundError:
        return 0
    versions = [-1]
    for name in names:
        numbered = re.fullmatch(r"version_(\d+)", os.path.basename(name.rstrip("/")))
        if numbered:
            versions.append(int(numbered[1]))
    return max(versions) + 1


def move_aside(paths: list[str]) -> None:
    """Move local files or folders into the folder ``replaced`` beside them."""
    for path in paths:
        folder, name = os.path.split(path)
        os.makedirs(os.path.join(folder, "replaced"), exist_ok=True)
        os.replace(path, os.path.join(folder, "replaced", name))
