"""The comment at the end of a file of ``torch.save``, which is a zip archive: there, a checkpoint has its manifest.

Every program that reads such archives passes over it, and to find it, their last bytes are enough.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

# How an archive begins, and how the record at its end does. The last two bytes of that tell how long a comment follows.
ZIP = b"PK\x03\x04"
_END = b"PK\x05\x06"
_END_SIZE = 22
_LONGEST = 2**16 - 1
# In bytes: where in a file to look for the comment.
LONGEST_END = _END_SIZE + _LONGEST


class _HoldingBack:
    """What ``torch.save`` takes for a file: passes an archive on, but for the record at its end.

    Attributes:
        size: bytes passed on.
        crc32: their checksum.
        failure: what the file raised. It is kept, as torch's writer, which is no Python, is to come to its end.
    """

    def __init__(self, file: Any) -> None:
        self.size = self.crc32 = 0
        self.failure: BaseException | None = None
        self._file = file
        self._last = b""

    def write(self, chunk: Any) -> int:
        """Pass on all but the last bytes of what has come so far."""
        last = self._last
        if len(chunk) < _END_SIZE:
            last, chunk = b"", last + bytes(chunk)
        self._pass_on(last)
        self._pass_on(chunk[:-_END_SIZE])
        self._last = bytes(chunk[-_END_SIZE:])
        return len(chunk)

    def flush(self) -> None:
        """Called by torch."""

    def _pass_on(self, chunk: Any) -> None:
        try:
            if self.failure is None:
                self._file.write(chunk)
        except BaseException as error:
            self.failure = error
        self.size += len(chunk)
        self.crc32 = zlib.crc32(chunk, self.crc32)

    def end(self, comment_on: Callable[[int, int], bytes]) -> None:
        """Write the end, with the comment that is made of size and checksum of all before the comment's length."""
        self._pass_on(self._last[:-2])
        comment = comment_on(self.size, self.crc32)
        self._pass_on(len(comment).to_bytes(2, "little") + comment)
        if self.failure is not None:
            raise self.failure


def save_commented(
    content: Any,
    file: Any,
    comment_on: Callable[[int, int], bytes],
) -> None:
    """Write what ``torch.save`` does, and a comment.

    Args:
        content: for torch.
        file: open to write.
        comment_on: makes the comment, of ASCII characters, from size and checksum of what stands before it.
    """
    held: Any = _HoldingBack(file)
    torch.save(content, held)
    held.end(comment_on)


def fits(comment: bytes) -> bool:
    """Whether a comment is short enough."""
    return len(comment) <= _LONGEST


def comment_in(end: bytes) -> tuple[bytes, int] | None:
    """The comment of an archive, and how many of its bytes at the end are the comment and its length.

    Args:
        end: the last :data:`LONGEST_END` bytes of the file, or all.

    Returns:
        None if that is not the end of an archive.
    """
    begin = end.rfind(_END)
    record = end[begin : begin + _END_SIZE]
    comment = end[begin + _END_SIZE :]
    if begin < 0 or int.from_bytes(record[-2:], "little") != len(comment):
        return None
    return comment, len(comment) + 2


def damaged_record(archive: bytes) -> str:
    """The name of the first record in an archive that was altered; "" if none was, as far as their checksums tell."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            for record in records.infolist():
                # Where torch was told to do without checksums, there are none.
                record.CRC = record.CRC or None  # type: ignore[assignment] # what zipfile takes for none
            return records.testzip() or ""
    except Exception as error:
        # What is damaged may raise anything.
        return f"its directory ({error})"
