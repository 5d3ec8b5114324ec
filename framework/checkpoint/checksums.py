"""Checksums of files of which several processes read a part each, so that all of them together read them once."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping

from ...strategies.group import GroupMember
from ..errors import CheckpointError, describe_error
from .storage import LocalStorage, RemoteStorage

# How many bytes to read at once.
_CHUNK = 4 * 2**20
# The polynomial of zlib's crc32, the highest power in the lowest bit; and in this form, the polynomials 1 and x.
_CRC32 = 0xEDB88320
_ONE = 1 << 31
_X = 1 << 30


def verify(
    sizes: Mapping[str, int],
    checksums: Mapping[str, int],
    storage: LocalStorage | RemoteStorage,
    group: GroupMember,
) -> list[str]:
    """See whether files are as they were written. A collective.

    The processes of a machine, which see the same files, read an equal share each; of a store's files, all processes.

    Args:
        sizes: in bytes, by path.
        checksums: as of ``zlib.crc32``.
        storage: where they are.
        group: the processes.

    Returns:
        The paths of those that were altered, the same in all processes.

    Raises:
        CheckpointError: if one cannot be read, in all processes.
    """
    place = _place(sizes, storage)
    by_rank = group.gather_objects(place)  # collective
    peers: dict[str, list[int]] = {}
    for rank, each in enumerate(by_rank):
        peers.setdefault(each, []).append(rank)
    share = peers[place].index(group.global_rank), len(peers[place])
    parts: dict[str, tuple[int, int]] = {}
    failure = ""
    try:
        parts = _parts(sizes, storage, *share)
    except Exception as error:
        # A store's library has errors of its own.
        failure = describe_error(error)
    found = group.gather_objects((parts, failure))  # collective
    for _, failure in found:
        if failure:
            raise CheckpointError(failure)
    altered = []
    for path, expected in checksums.items():
        for ranks in peers.values():
            checksum = 0
            for rank in ranks:
                checksum = _joined(checksum, *found[rank][0][path])
            if checksum != expected and path not in altered:
                altered.append(path)
    return altered


def checksum_of(path: str, size: int, storage: LocalStorage | RemoteStorage) -> int:
    """Return the checksum of a whole file, as of ``zlib.crc32``."""
    return _parts({path: size}, storage, 0, 1)[path][0]


def _place(sizes: Mapping[str, int], storage: LocalStorage | RemoteStorage) -> str:
    """Return what is the same in processes that see the same files."""
    if not storage.is_local or not sizes:
        return ""
    machine = socket.gethostname()
    try:
        # Two machines may have one name.
        about = os.stat(next(iter(sizes)))
    except OSError:
        return machine
    return f"{machine} {about.st_dev} {about.st_ino}"


def _parts(
    sizes: Mapping[str, int],
    storage: LocalStorage | RemoteStorage,
    index: int,
    count: int,
) -> dict[str, tuple[int, int]]:
    """The checksum and length of this process's part of each file; one of ``count`` equal parts of all bytes."""
    parts = {}
    total = sum(sizes.values())
    first = total * index // count
    last = total * (index + 1) // count
    buffer = memoryview(bytearray(_CHUNK))
    for path, size in sizes.items():
        begin = at = min(max(first, 0), size)
        end = min(max(last, 0), size)
        checksum = 0
        while at < end:
            chunk = buffer[: end - at]
            storage.read_into(path, chunk, at)
            checksum = zlib.crc32(chunk, checksum)
            at += len(chunk)
        parts[path] = (checksum, end - begin)
        first -= size
        last -= size
    return parts


def _joined(first: int, second: int, length: int) -> int:
    """The checksum of two parts together, of which the second has so many bytes: zlib's crc32_combine."""
    factor = _ONE
    # x to the power of 8, of 16, of 32 …: by which the first part is shifted for one byte, two, four …
    power = _X
    for _ in range(3):
        power = _product(power, power)
    while length:
        if length & 1:
            factor = _product(factor, power)
        power = _product(power, power)
        length >>= 1
    return _product(factor, first) ^ second


def _product(a: int, b: int) -> int:
    """Multiply polynomials modulo that of crc32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (_CRC32 * (b & 1))
    return product
