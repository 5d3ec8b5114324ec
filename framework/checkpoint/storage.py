"""Files and folders: local ones by the standard library, all others, such as ``s3://…``, through fsspec."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import has_magic
from pathlib import Path
from typing import Any


def is_local(path: str) -> bool:
    """Whether ``path`` is no URL of another file system."""
    return "://" not in path


def plain(path: str) -> str:
    """``path``, without the scheme of a URL that names a local one."""
    return (
        path.partition("://")[2] if path.startswith(("file://", "local://")) else path
    )


def _filesystem(path: str) -> Any:
    import fsspec

    # Its listings are not kept: another thread's or process's file system would not see in them what this one writes.
    return fsspec.core.url_to_fs(path, use_listings_cache=False)[0]


def join(path: str, *parts: str) -> str:
    """Join path or URL parts."""
    return (
        os.path.join(path, *parts)
        if is_local(path)
        else "/".join([path.rstrip("/"), *parts])
    )


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    return os.path.exists(path) if is_local(path) else _filesystem(path).exists(path)


def is_file(path: str) -> bool:
    """Whether there is a file."""
    return os.path.isfile(path) if is_local(path) else _filesystem(path).isfile(path)


def size(path: str) -> int:
    """A file's bytes."""
    return os.path.getsize(path) if is_local(path) else _filesystem(path).size(path)


def read_bytes(path: str, count: int | None = None, limit: int | None = None) -> bytes:
    """The content of a file, or its first ``count`` bytes; of a local one, ``limit`` bytes at most."""
    if is_local(path):
        with open(path, "rb") as file:
            return file.read(count or limit)
    return (
        _filesystem(path).cat_file(path, 0, count)
        if count
        else _filesystem(path).cat_file(path)
    )


def list_names(path: str) -> list[str]:
    """The names of what is in a folder."""
    if is_local(path):
        return os.listdir(path)
    return [
        name.rstrip("/").rpartition("/")[2]
        for name in _filesystem(path).ls(path, detail=False)
    ]


def list_files(path: str, within: Collection[str] | None = None) -> list[str]:
    """The names, relative to a folder, of all files below it, and of local folders that are empty, links or closed.

    Args:
        path: the folder.
        within: of what is in it, look at these only. There may be much else in a local one.
    """
    if is_local(path):
        begin = list_names(path) if within is None else within
        entries = [
            Path(path, name) for name in begin if os.path.lexists(join(path, name))
        ]
        below = (
            other
            for entry in entries
            if _is_open_folder(entry)
            for other in entry.rglob("*")
        )
        own = (entry for entry in (*entries, *below) if not _is_open_folder(entry))
        return [entry.relative_to(path).as_posix() for entry in own]
    filesystem = _filesystem(path)
    root = filesystem._strip_protocol(path)
    return [name[len(root) :].lstrip("/") for name in filesystem.find(path)]


def _is_open_folder(entry: Path) -> bool:
    """Whether it is a folder that shows what is in it."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    try:
        return any(entry.iterdir())
    except OSError:  # nobody may look into it, such as the system's ``lost+found``
        return False


@contextmanager
def writing(path: str) -> Iterator[Any]:
    """Open a new file to write to, piece by piece; on leaving it is on disk, or at the store."""
    if is_local(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    filesystem = _filesystem(path)
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    file = filesystem.open(path, "wb")
    try:
        yield file
        file.close()
    except BaseException:
        with suppress(
            Exception
        ):  # what went wrong is on its way already; to close it would send what it has
            file.discard()
        file.closed = True
        raise


@contextmanager
def replacing(path: str) -> Iterator[Any]:
    """Open a file to write that appears all at once: what is at ``path`` is the old content or the new."""
    path = plain(path)
    if not is_local(path):
        with writing(path) as file:  # a store shows a file when it is complete
            yield file
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with writing(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(path) or ".")


def write_file(path: str, content: bytes) -> None:
    """Write a small file all at once."""
    with replacing(path) as file:
        file.write(content)


def sync_directory(path: str) -> None:
    """Make a rename inside the local folder ``path`` last over a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing if it is not there."""
    if not exists(path):
        return
    if not is_local(path):
        _remove_remote(_filesystem(path), path)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _remove_remote(filesystem: Any, path: str) -> None:
    if not has_magic(path):
        filesystem.rm(path, recursive=True)
        return
    # ``rm`` would take the name for a pattern, and remove what others have.
    for file in filesystem.find(path):
        filesystem.rm_file(file)


def remove_files(path: str, names: Iterable[str]) -> None:
    """Delete those files below a folder that are there, and the folders in it that this empties."""
    names = {*names}
    there = {*list_files(path, within={name.partition("/")[0] for name in names})}
    listed = [
        join(path, *name.split("/")) for name in sorted(there.intersection(names))
    ]
    if is_local(path):
        for file in listed:
            os.unlink(file)
            remove_empty_folders(os.path.dirname(file), path)
    elif listed:
        filesystem = _filesystem(path)
        if len(listed) == len(there) and filesystem._parent(path).strip(
            "/"
        ):  # never a bucket
            _remove_remote(filesystem, path)
        elif any(map(has_magic, listed)):
            for file in listed:
                filesystem.rm_file(file)
        else:
            filesystem.rm(listed)


def remove_empty_folders(path: str, root: str) -> None:
    """Delete a folder, and those around it as far as ``root``, which stays, while there is nothing in them."""
    with suppress(Exception):  # it is not empty, or gone, or the store has no folders
        while path != root and path.startswith(join(root, "")):
            os.rmdir(path) if is_local(path) else _filesystem(path).rmdir(path)
            path = path.rpartition("/")[0]


def find_folders_with(directory: str, names: tuple[str, ...]) -> list[str]:
    """All folders below ``directory``, and itself, that hold a file of one of these names."""
    if not exists(directory):
        return []
    if is_local(directory):
        return [
            folder
            for folder, _, files in os.walk(directory)
            if any(name in files for name in names)
        ]
    filesystem = _filesystem(directory)
    root = filesystem._strip_protocol(directory)
    folders = {
        file.rpartition("/")[0]
        for file in filesystem.find(directory)
        if file.rpartition("/")[2] in names
    }
    return [
        join(directory, folder[len(root) :].lstrip("/")).rstrip("/")
        for folder in sorted(folders)
    ]
