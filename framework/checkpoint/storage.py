"""Where files are: local ones through the standard library, all others, such as ``s3://…``, through fsspec."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import has_magic
from pathlib import Path
from typing import Any, ClassVar

# In which parts a store's files are read, in bytes.
_BLOCK = 2**23
# So many are kept of a file that is read once.
_KEPT_BLOCKS = 4


def is_local(path: str) -> bool:
    """Whether ``path`` is no URL of another file system."""
    return "://" not in path


def without_local_scheme(path: str) -> str:
    """``path``, or the local path that a URL such as ``file:///data`` names."""
    if path.startswith(("file://", "local://")):
        return path.partition("://")[2]
    return path


def join(path: str, *parts: str) -> str:
    """Join path or URL parts."""
    if is_local(path):
        return os.path.join(path, *parts)
    return "/".join([path.rstrip("/"), *parts])


def top_of(name: str) -> str:
    """The first part of a file's name below a folder: ``model`` of ``model/rank-0.safetensors``."""
    return name.partition("/")[0]


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_size, about.st_mtime_ns


class LocalStorage:
    """Files of this machine."""

    is_local: ClassVar = True
    exists = staticmethod(os.path.exists)
    is_file = staticmethod(os.path.isfile)
    size = staticmethod(os.path.getsize)
    names = staticmethod(os.listdir)
    remove_empty_folder = staticmethod(os.rmdir)

    def __init__(self) -> None:
        # Size and time of change of files of which parts are read, one after the other.
        self._seen: dict[str, tuple[int, int]] = {}

    def note(self, path: str) -> None:
        """Note which file there is, so that no part of another one is read that replaces it."""
        self._seen[path] = _identity(os.stat(path))

    def read(
        self,
        path: str,
        count: int | None = None,
    ) -> bytes:
        """The content of a file, or its first ``count`` bytes."""
        with open(path, "rb") as file:
            return file.read(count)

    def read_into(self, path: str, memory: memoryview, begin: int) -> None:
        """Fill ``memory`` with a file's bytes from ``begin`` on.

        Raises:
            EOFError: if there are fewer.
            OSError: if it is not the file any more that was noted.
        """
        with open(path, "rb", buffering=0) as file:
            now = _identity(os.fstat(file.fileno()))
            if self._seen.get(path, now) != now:
                raise OSError(f"{path} was replaced while it was read")
            file.seek(begin)
            while memory:
                count = file.readinto(memory)
                if not count:
                    raise EOFError(f"{path} ends early")
                memory = memory[count:]

    def read_at_most(
        self,
        path: str,
        count: int,
    ) -> bytes:
        """The content of a file that should be small: its first bytes, if it is not."""
        return self.read(path, count)

    def read_end(
        self,
        path: str,
        count: int,
    ) -> bytes:
        """The last ``count`` bytes of a file, or all."""
        with open(path, "rb") as file:
            file.seek(max(0, self.size(path) - count))
            return file.read(count)

    def files(
        self,
        path: str,
        within: Collection[str] | None = None,
    ) -> list[str]:
        """The names, relative to a folder, of what is below it: files, and folders that are empty, links or unreadable.

        Args:
            path: the folder.
            within: names in it: look only at these and what is below them, as there may be very many files beside them.
        """
        found = []
        for name in self.names(path) if within is None else within:
            if os.path.lexists(join(path, name)):
                entry = Path(path, name)
                found.append(entry)
                found += entry.rglob("*") if _is_open_folder(entry) else ()
        return [
            entry.relative_to(path).as_posix()
            for entry in found
            if not _is_open_folder(entry)
        ]

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        """Open a new file to write to, bit by bit; on leaving it is on disk."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def replacing(self, path: str) -> Iterator[Any]:
        """Open a file to write that appears all at once: what is at ``path`` is the old content or the new."""
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with self.writing(temporary) as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(os.path.dirname(path) or ".")

    def remove(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing if it is not there."""
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)

    def move(self, path: str, target: str) -> None:
        """Rename a file, or a folder with all that is in it."""
        os.rename(path, target)

    def remove_files(
        self,
        path: str,
        names: Iterable[str],
    ) -> None:
        """Delete those of the files below a folder that exist, and the folders in it that this empties."""
        names = {*names}
        there = self.files(path, within={top_of(name) for name in names})
        for name in sorted(names.intersection(there)):
            file = join(path, *name.split("/"))
            os.unlink(file)
            remove_empty_folders(os.path.dirname(file), path)

    def folders_with(
        self,
        path: str,
        names: Collection[str],
    ) -> list[str]:
        """All folders below ``path``, and itself, that hold a file of one of these names."""
        return [
            folder
            for folder, _, files in os.walk(path)
            if not {*names}.isdisjoint(files)
        ]

    def files_ending(
        self,
        path: str,
        endings: tuple[str, ...],
    ) -> list[str]:
        """All files below ``path`` that are no links, and whose names end in one of these ways."""
        found = []
        for folder, _, files in os.walk(path):
            found += [join(folder, name) for name in files if name.endswith(endings)]
        return [file for file in found if not os.path.islink(file)]


def _is_open_folder(entry: Path) -> bool:
    """Whether it is a folder, no link, and has something in it that we may see."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    try:
        return any(entry.iterdir())
    except OSError:
        # Nobody may look into it, such as the system's ``lost+found``.
        return False


class RemoteStorage:
    """Files of an object store or another file system, with the methods of :class:`LocalStorage`.

    Nothing can be renamed there in one step; but a file appears only when all of it has arrived, so that to write one
    is also to replace it.

    Args:
        path: any URL there.
        keeps: keep what :meth:`read_into` has read, not only the last of it, as all of it will be read again.
    """

    is_local: ClassVar = False

    def __init__(self, path: str, keeps: bool = False) -> None:
        import fsspec

        # Listings are not kept: another thread's or process's file system would not see in them what this one writes.
        self.system: Any = fsspec.core.url_to_fs(path, use_listings_cache=False)[0]
        self.exists = self.system.exists
        self.is_file = self.system.isfile
        self.size = self.system.size
        self.remove_empty_folder = self.system.rmdir
        self._keeps = keeps
        # What is small is not worth a request.
        self._blocks: dict[tuple[str, int], bytes] = {}

    def note(self, path: str) -> None:
        """Do nothing: a store replaces a file as a whole, and its checksum tells."""

    def _block(
        self,
        path: str,
        number: int,
    ) -> bytes:
        """A block of a file, which is kept for a while."""
        key = path, number
        if key not in self._blocks:
            if not self._keeps and len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = self._read_block(path, number)
        return self._blocks[key]

    def _read_block(self, path: str, number: int) -> bytes:
        begin = number * _BLOCK
        end = min(begin + _BLOCK, self.size(path))
        # A store refuses a part of nothing.
        if begin >= end:
            return b""
        content = self.system.cat_file(
            path,
            start=begin,
            end=end,
        )
        if len(content) > end - begin:
            # A server that knows no parts has sent all of it.
            return content[begin:end]
        return content

    def read_into(self, path: str, memory: memoryview, begin: int) -> None:
        """Fill ``memory`` with a file's bytes from ``begin`` on.

        Raises:
            EOFError: if there are fewer.
        """
        while memory:
            number, first = divmod(begin, _BLOCK)
            content = self._block(path, number)[first : first + len(memory)]
            if not content:
                raise EOFError(f"{path} ends early")
            memory[: len(content)] = content
            memory = memory[len(content) :]
            begin += len(content)

    def read(
        self,
        path: str,
        count: int | None = None,
    ) -> bytes:
        """The content of a file, or its first ``count`` bytes."""
        if count is None:
            return self.system.cat_file(path)
        # By name, as the second argument of some stores is another.
        return self.system.cat_file(path, start=0, end=count)

    def read_at_most(
        self,
        path: str,
        count: int,
    ) -> bytes:
        """The content of a file that should be small; all of it, as a store refuses a part of an empty one."""
        return self.read(path)

    def read_end(
        self,
        path: str,
        count: int,
    ) -> bytes:
        """The last ``count`` bytes of a file, or all."""
        size = self.size(path)
        # A store refuses a part of an empty file.
        if not size:
            return b""
        return self.system.cat_file(path, start=max(0, size - count), end=size)

    def names(self, path: str) -> list[str]:
        """The names of what is in a folder."""
        listed = self.system.ls(path, detail=False)
        return [name.rstrip("/").rpartition("/")[2] for name in listed]

    def files(self, path: str) -> list[str]:
        """The names, relative to a folder, of all files below it."""
        begin = len(self.system._strip_protocol(path))
        return [name[begin:].lstrip("/") for name in self.system.find(path)]

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        """Open a new file to write to, bit by bit; on leaving it is at the store."""
        self.system.makedirs(self.system._parent(path), exist_ok=True)
        file = self.system.open(path, "wb")
        try:
            yield file
            file.close()
        except BaseException:
            # To close the file would send what it has, and may raise in place of the error that is being raised.
            with suppress(Exception):
                file.discard()
            file.closed = True
            raise

    replacing = writing

    def remove(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing if it is not there."""
        if not self.system.exists(path):
            return
        if not has_magic(path):
            self.system.rm(path, recursive=True)
            return
        # ``rm`` would take the name for a pattern, and remove what others have.
        for file in self.system.find(path):
            self.system.rm_file(file)

    def move(self, path: str, target: str) -> None:
        """Copy a file, or a folder with all that is in it, and remove it then."""
        self.system.mv(path, target, recursive=True)

    def remove_files(
        self,
        path: str,
        names: Iterable[str],
    ) -> None:
        """Delete those of the files below a folder that exist; if these are all, in one request for the folder."""
        there = {*self.files(path)}
        listed = [join(path, name) for name in sorted(there.intersection(names))]
        is_bucket = not self.system._parent(path).strip("/")
        if listed and len(listed) == len(there) and not is_bucket:
            self.remove(path)
        elif any(map(has_magic, listed)):
            for file in listed:
                self.system.rm_file(file)
        elif listed:
            self.system.rm(listed)

    def folders_with(
        self,
        path: str,
        names: Collection[str],
    ) -> list[str]:
        """All folders below ``path``, and itself, that hold a file of one of these names."""
        folders = set()
        for file in self.files(path):
            folder, _, name = file.rpartition("/")
            if name in names:
                folders.add(join(path, folder).rstrip("/"))
        return sorted(folders)

    def files_ending(
        self,
        path: str,
        endings: tuple[str, ...],
    ) -> list[str]:
        """All files below ``path`` whose names end in one of these ways."""
        return [join(path, name) for name in self.files(path) if name.endswith(endings)]


def storage_of(path: str, keeps: bool = False) -> LocalStorage | RemoteStorage:
    """What reads and writes files at ``path``; arguments as of :class:`RemoteStorage`."""
    return LocalStorage() if is_local(path) else RemoteStorage(path, keeps)


def writing(path: str) -> AbstractContextManager[Any]:
    """Open a new file to write to, bit by bit; on leaving it is on disk, or at the store."""
    return storage_of(path).writing(path)


def write_file(path: str, content: bytes) -> None:
    """Write a small file all at once."""
    path = without_local_scheme(path)
    with storage_of(path).replacing(path) as file:
        file.write(content)


def remove_empty_folders(path: str, root: str) -> None:
    """Delete a folder, and those around it as far as ``root``, which stays, while there is nothing in them."""
    storage = storage_of(path)
    # It may be gone, or not empty, or the store may have no folders.
    with suppress(Exception):
        while path != root and path.startswith(join(root, "")):
            storage.remove_empty_folder(path)
            path = path.rpartition("/")[0]


def sync_directory(path: str) -> None:
    """Make a rename inside the local folder ``path`` last over a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
