"""The tensors of safetensors files, of which any part can be read by itself; shards of several files count as one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...strategies.stored_tensors import Offset, StoredTensor, empty
from ...strategies.tensor_shards import TensorShard
from .storage import LocalStorage, RemoteStorage
from .tensors import DTYPES, memory_view, naming_damage

# How many bytes of a file to read first: enough for most headers.
_BEGINNING = 2**16
# One that is longer was made to fill the memory.
_LONGEST_HEADER = 2**28
# How many numbers to read at once where they cannot be read to where they belong.
_CHUNK = 2**20


@dataclass
class _Piece:
    """A part of a tensor in a file, of which the numbers stand in order.

    Attributes:
        path: of the file.
        begin: the byte with which it begins.
        shape: its own.
        offset: where it begins in the tensor.
        place: which numbers of the flattened tensor it holds, from the first to behind the last; None if these are not
            all of a range.
    """

    path: str
    begin: int
    shape: tuple[int, ...]
    offset: Offset
    place: tuple[int, int] | None


class FileTensor(StoredTensor):
    """A tensor of which files hold pieces.

    Args:
        shape: of the tensor.
        dtype: its type.
        storage: where the files are.
        device: where a whole tensor is put.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        storage: LocalStorage | RemoteStorage,
        device: Any,
    ) -> None:
        super().__init__(shape, dtype)
        self.storage = storage
        self.device = device
        self.pieces: list[_Piece] = []

    def add(
        self, path: str, begin: int, shape: tuple[int, ...], offset: Offset
    ) -> None:
        """Take a piece, as of :class:`_Piece`.

        Raises:
            ValueError: if it is not inside of the tensor.
        """
        if isinstance(offset, int):
            starts = (offset,)
            lengths = (math.prod(shape),)
            whole = (self.numel(),)
        else:
            starts = offset
            lengths = shape
            whole = self.shape
        for start, length, full in zip(starts, lengths, whole, strict=True):
            if not 0 <= start <= start + length <= full:
                raise ValueError(f"a part {shape} at {offset} is not in {self.shape}")
        place = _place(shape, offset, self.shape)
        self.pieces.append(_Piece(path, begin, shape, offset, place))

    def read(self, into: Tensor, offset: Offset) -> None:
        """Read a part, from those pieces that have some of it."""
        wanted = _place(tuple(into.shape), offset, self.shape)
        is_in_order = wanted is not None and all(piece.place for piece in self.pieces)
        is_resolved = not into.is_conj() and not into.is_neg()
        if not (is_in_order and is_resolved and into.is_contiguous()):
            shard = TensorShard(
                into,
                self.shape,
                offset,
            )
            into.copy_(shard.slice_of(self._joined()).reshape(into.shape))
            return
        assert wanted is not None
        numbers = into.view(-1)
        for piece in self.pieces:
            assert piece.place is not None
            begin = max(piece.place[0], wanted[0])
            end = min(piece.place[1], wanted[1])
            if begin < end:
                self._read_numbers(
                    piece,
                    begin - piece.place[0],
                    numbers[begin - wanted[0] : end - wanted[0]],
                )

    def whole(self) -> Tensor:
        """Read all pieces."""
        return self._joined().to(self.device)

    def _joined(self) -> Tensor:
        whole = empty(self.shape, self.dtype)
        for piece in self.pieces:
            like = torch.empty(piece.shape, device="meta")
            target = TensorShard(like, self.shape, piece.offset).slice_of(whole)
            if target.is_contiguous():
                self._read_numbers(piece, 0, target.view(-1))
            else:
                numbers = empty(piece.shape, self.dtype)
                self._read_numbers(piece, 0, numbers.view(-1))
                target.copy_(numbers)
        return whole

    def _read_numbers(self, piece: _Piece, first: int, into: Tensor) -> None:
        """Read numbers of a piece, from the one of this index on; ``into`` has one dimension, and may be elsewhere."""
        size = self.dtype.itemsize
        if into.device.type == "cpu" and into.dtype == self.dtype:
            begin = piece.begin + first * size
            if into.numel():
                self.storage.read_into(piece.path, memory_view(into), begin)
            return
        for part in into.split(_CHUNK):
            numbers = empty(tuple(part.shape), self.dtype)
            self._read_numbers(piece, first, numbers)
            part.copy_(numbers)
            first += part.numel()


def _place(
    shape: tuple[int, ...], offset: Offset, whole: tuple[int, ...]
) -> tuple[int, int] | None:
    """Which numbers of a flattened tensor a part of it is: from the first to behind the last; None if it is no range.

    Args:
        shape: of the part.
        offset: where it begins.
        whole: the tensor's shape.
    """
    count = math.prod(shape)
    if isinstance(offset, int):
        return offset, offset + count
    begin = 0
    stride = 1
    is_whole = True
    for start, size, full in zip(
        reversed(offset), reversed(shape), reversed(whole), strict=True
    ):
        if not is_whole and size != 1:
            return None
        is_whole &= size == full
        begin += start * stride
        stride *= full
    return begin, begin + count


def open_tensors(
    sizes: Mapping[str, int], storage: LocalStorage | RemoteStorage, device: Any
) -> dict[str, FileTensor]:
    """The tensors of files that belong together, as they may hold shards of the same ones.

    Args:
        sizes: the files' sizes in bytes, by path.
        storage: where they are.
        device: where tensors that are read whole are put.

    Raises:
        ValueError: if a file is damaged or was made to harm, a shard is missing or does not fit, or a name is there
            twice.
    """
    tensors: dict[str, FileTensor] = {}
    sharded = set()
    for path, size in sizes.items():
        with naming_damage():
            header, begin = _header(path, size, storage)
            metadata = header.pop("__metadata__", {})
            dtypes, aliases, shards = (
                json.loads(metadata.get(key, "{}"))
                for key in ("dtypes", "aliases", "pieces")
            )
        for name, entry in header.items():
            if name in tensors and not (name in shards and name in sharded):
                raise ValueError(f"{name} is there twice")
            with naming_damage():
                shape, dtype = _kind(entry, dtypes.get(name), size - begin)
                whole, offset = shards.get(name, (shape, 0))
                offset = offset if isinstance(offset, int) else tuple(offset)
                tensor = tensors.setdefault(
                    name, FileTensor(tuple(whole), dtype, storage, device)
                )
                if (tensor.shape, tensor.dtype) != (tuple(whole), dtype):
                    raise ValueError(f"the parts of {name} are of several kinds")
                tensor.add(path, begin + entry["data_offsets"][0], shape, offset)
            sharded |= {name} & shards.keys()
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if begin + max(ends, default=0) != size:
            raise ValueError(f"{path} has more or fewer bytes than its tensors")
        with naming_damage():
            tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    incomplete = []
    for name, tensor in tensors.items():
        if sum(math.prod(piece.shape) for piece in tensor.pieces) != tensor.numel():
            incomplete.append(name)
    if incomplete:
        raise ValueError(f"of {', '.join(incomplete)}, a part is missing")
    return tensors


def _header(
    path: str, size: int, storage: LocalStorage | RemoteStorage
) -> tuple[dict[str, Any], int]:
    """What a file says of its tensors, and with which byte these begin."""
    beginning = storage.read(path, _BEGINNING)
    begin = 8 + int.from_bytes(beginning[:8], "little")
    if begin > min(size, _LONGEST_HEADER):
        raise ValueError(f"its header is said to have {begin - 8} bytes")
    if begin > len(beginning):
        beginning = storage.read(path, begin)
    return json.loads(beginning[8:begin]), begin


def _kind(
    entry: dict[str, Any], dtype_name: str | None, size: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and type of a tensor in a file.

    Args:
        entry: what the header says of it.
        dtype_name: its type, if the format lacks that.
        size: the bytes of all of the file's tensors.

    Raises:
        ValueError: if it does not have the bytes for this shape.
    """
    shape = tuple(entry["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"{entry} has a negative length")
    dtype = DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if (
        not 0 <= begin <= end <= size
        or end - begin != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{entry} is more or less than there is")
    if dtype_name is None:
        return shape, dtype
    dtype = getattr(torch, dtype_name)
    # It was written in one more dimension, as numbers that the format has.
    shape = shape[:-1]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{entry} holds no {dtype_name}")
    return shape, dtype
