"""Fingerprints: 64 bits that tell whether tensors are the same to the last bit.

The bytes of a tensor, in its logical order, are read as integers of 32 bits: x[0], x[1], and so on. Its sum is that of
c[i] * x[i] modulo 2**64, where c are odd numbers that look random. Sums of integers are not rounded, so neither the
device, the number of threads nor the order of summation matters, and a shard's sum is a part of the whole tensor's.

One flipped bit changes its integer by a power of two below 2**32, and so the sum, as the factor is odd: it is always
found. Two changes that are not made on purpose cancel each other with a probability of 2**-32 or less.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...strategies.tensor_shards import TensorShard

# Integers in a row. Those of one column have the same factor, and so have rows of one number in their block.
ROW = 4096
# Rows in a block.
BLOCK = 4096
# Rows that are multiplied at once: on the CPU, so few that they stay in its cache.
ROWS_AT_ONCE = {"cpu": 32}
ROWS_AT_ONCE_ELSEWHERE = 512
# Integers of short tensors that are multiplied at once.
RUNS_AT_ONCE = 2**20

_ALL = 2**64
# Each kind of factors is a sequence of its own.
_COLUMNS, _ROWS, _BLOCKS, _PARTS = range(4)
# Index of a tensor, and what a part of its sum is still to be multiplied by.
_Owner = tuple[int, int]


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Return the fingerprint of tensors: all bits, types and shapes count; their names and their order do not.

    Args:
        tensors: of any types and devices. Distributed ones (``DTensor``) count with this process's shard.

    Returns:
        From 0 to 2**64 - 1.
    """
    return combined(fingerprints(list(tensors)))


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Return the fingerprint of each tensor; reading them waits for the device once."""
    return finish(tensors, sums_of(tensors))


def combined(each: Iterable[int]) -> int:
    """Return one fingerprint of many, whatever their order is."""
    return sum(map(_mix, each)) % _ALL


def as_hex(value: int) -> str:
    """Return 64 bits as 16 hexadecimal digits."""
    return f"{value % _ALL:016x}"


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, each once, trained or not."""
    return dict(module.named_parameters())


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that there are, by the name of their parameter."""
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return gradients


# The parts of it, for tensors of which each process has a shard.


def sums_of(tensors: Sequence[Tensor | TensorShard]) -> list[int]:
    """Return the sum of each tensor; reading them waits for the device once.

    Args:
        tensors: or shards; those of one tensor have sums that add up to the whole one's, modulo 2**64.
    """
    sums = _Sums()
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, TensorShard):
            sums.add(index, tensor.tensor, first=_first_byte(tensor))
            continue
        first, *others = _plain_parts(tensor.detach())
        sums.add(index, first)
        for number, part in enumerate(others):
            sums.add(index, part, factor=_factor(_PARTS, number))
    return sums.read(len(tensors))


def finish(tensors: Sequence[Tensor | TensorShard], sums: Sequence[int]) -> list[int]:
    """Return the fingerprint of each tensor from its sum: with its type and shape."""
    finished = []
    for tensor, total in zip(tensors, sums, strict=True):
        finished.append(_mix(total + _kind_of(tensor)))
    return finished


def _kind_of(tensor: Tensor | TensorShard) -> int:
    """Return a number for a tensor's type and shape."""
    data = tensor.tensor if isinstance(tensor, TensorShard) else tensor
    return _number_of(str(data.dtype), tuple(tensor.shape))


@cache
def _number_of(dtype: str, shape: tuple[int, ...]) -> int:
    text = f"{dtype} {shape}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return what holds a tensor's numbers: itself, or what a sparse or a wrapping one is made of."""
    if is_traceable_wrapper_subclass(tensor):
        made_of: Any = tensor
        names, _ = made_of.__tensor_flatten__()
        parts = []
        for name in names:
            parts += _plain_parts(getattr(tensor, name))
        return parts
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.values(), tensor.indices()]
    if tensor.layout != torch.strided:
        return _plain_parts(tensor.to_sparse_coo())
    return [tensor]


def _first_byte(shard: TensorShard) -> int:
    """Return where a shard begins in the bytes of the whole tensor, of which it is a range if only rows were split."""
    size = shard.tensor.element_size()
    if isinstance(shard.offset, int):
        return shard.offset * size
    first = 0
    for length, start in zip(
        reversed(shard.shape), reversed(shard.offset), strict=True
    ):
        first += start * size
        size *= length
    return first


def _words(tensor: Tensor, before: int) -> Tensor:
    """Return a dense tensor's bytes as integers of 32 bits: the same memory, or a copy where it is not in order.

    Args:
        tensor: of any type.
        before: how many bytes of the first integer belong to another shard; these are 0.
    """
    if tensor.is_complex() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    flat = tensor.reshape(-1)
    size = flat.element_size()
    begins_in_order = flat.storage_offset() * size % 4 == 0
    ends_in_order = flat.numel() * size % 4 == 0
    if begins_in_order and ends_in_order and before == 0:
        return flat.view(torch.int32)
    data = flat.view(torch.uint8)
    count = before + data.numel()
    num_words = -(-count // 4)
    filled = data.new_zeros(num_words * 4)
    filled[before:count] = data
    return filled.view(torch.int32)


class _Sums:
    """The sums of many tensors: short ones are summed together, and nothing is read before the end."""

    def __init__(self) -> None:
        # By device: what stands in one row and waits to be summed, as (place, integers); numbers that are summed; and
        # whose these are, with a factor that they still have to be multiplied by.
        self._runs: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        self._run_owners: dict[torch.device, list[_Owner]] = defaultdict(list)
        self._numbers: dict[torch.device, list[Tensor]] = defaultdict(list)
        self._owners: dict[torch.device, list[_Owner]] = defaultdict(list)

    def add(self, owner: int, tensor: Tensor, first: int = 0, factor: int = 1) -> None:
        """Sum a dense tensor.

        Args:
            owner: index of the tensor of which it is a part.
            tensor: of any type.
            first: the byte of the whole tensor with which it begins.
            factor: of all of it.
        """
        words = _words(tensor, first % 4)
        place = first // 4
        count = words.numel()
        # What is left of the row in which it begins; behind it are whole rows, and then the beginning of one.
        head = min(-place % ROW, count)
        tail = count - (count - head) % ROW
        if head:
            self._add_run(owner, words[:head], place, factor)
        if tail > head:
            matrix = words[head:tail].view(-1, ROW)
            first_row = (place + head) // ROW
            self._add_rows(owner, matrix, first_row, factor)
        if count > tail:
            self._add_run(owner, words[tail:], place + tail, factor)

    def _add_run(self, owner: int, words: Tensor, place: int, factor: int) -> None:
        block, row = divmod(place // ROW, BLOCK)
        device = words.device
        column = place % ROW
        row_factor = _factor(_ROWS, row) * _factor(_BLOCKS, block)
        self._runs[device].append((column, words))
        self._run_owners[device].append((owner, factor * row_factor))

    def _add_rows(self, owner: int, matrix: Tensor, first: int, factor: int) -> None:
        """Sum whole rows, ``(rows, ROW)``, from row ``first`` of the whole tensor on."""
        device = matrix.device
        tables = _tables(device)
        sums = _row_sums(matrix, tables)
        done = 0
        while done < len(sums):
            block, row = divmod(first + done, BLOCK)
            in_block = sums[done : done + BLOCK - row]
            row_factors = tables.rows[row : row + len(in_block)]
            number = (in_block * row_factors).sum()
            block_factor = _factor(_BLOCKS, block)
            self._numbers[device].append(number.view(1))
            self._owners[device].append((owner, factor * block_factor))
            done += len(in_block)

    def _sum_runs(self, device: torch.device) -> None:
        """Sum all that stands in single rows, so many integers at once as work in little memory."""
        columns = _tables(device).columns
        runs = self._runs[device]
        while runs:
            taken = _num_at_once(runs)
            words: list[Tensor] = []
            factors: list[Tensor] = []
            lengths: list[int] = []
            for column, integers in runs[:taken]:
                length = len(integers)
                words.append(integers)
                factors.append(columns[column : column + length])
                lengths.append(length)
            runs = runs[taken:]
            products = torch.cat(words) * torch.cat(factors)
            ends = torch.tensor([*accumulate(lengths)], device=device)
            sums_until = products.cumsum(0)[ends - 1]
            # Differences of sums that have wrapped around are right.
            zero = torch.zeros_like(sums_until[:1])
            sums = torch.diff(sums_until, prepend=zero)
            self._numbers[device].append(sums)
        self._owners[device] += self._run_owners[device]

    def read(self, count: int) -> list[int]:
        """Return the sums of so many tensors."""
        sums = [0] * count
        for device in {*self._runs, *self._numbers}:
            self._sum_runs(device)
            # A host–device sync.
            numbers = torch.cat(self._numbers[device]).tolist()
            pairs = zip(self._owners[device], numbers, strict=True)
            for (owner, factor), number in pairs:
                sums[owner] += number * factor
        return [total % _ALL for total in sums]


def _num_at_once(runs: list[tuple[int, Tensor]]) -> int:
    """Return how many of the first runs are summed together."""
    size = 0
    for index, (_, words) in enumerate(runs):
        if size >= RUNS_AT_ONCE:
            return index
        size += words.numel()
    return len(runs)


def _row_sums(matrix: Tensor, tables: _Tables) -> Tensor:
    """Return the sum of each row of integers of 32 bits, with the factors of its columns."""
    rows = len(matrix)
    sums = matrix.new_empty(rows, dtype=torch.int64)
    at_once = len(tables.scratch)
    for row in range(0, rows, at_once):
        wide = tables.scratch[: rows - row]
        wide.copy_(matrix[row : row + at_once])
        out = sums[row : row + at_once]
        if wide.device.type == "cpu":
            torch.mv(wide, tables.columns, out=out)
        else:
            # Only the CPU multiplies integers by a vector in one call.
            products = wide.mul_(tables.columns)
            torch.sum(products, 1, out=out)
    return sums


# The factors.


class _Tables:
    """The factors of columns and rows on a device, and memory to work in.

    Args:
        device: the device.

    Attributes:
        columns: ``(ROW,)``.
        rows: of a block, ``(BLOCK,)``.
        scratch: rows of integers that are multiplied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.columns = _table(_COLUMNS, ROW).to(device)
        self.rows = _table(_ROWS, BLOCK).to(device)
        at_once = ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE_ELSEWHERE)
        self.scratch = torch.empty(at_once, ROW, dtype=torch.int64, device=device)


@cache
def _tables(device: torch.device) -> _Tables:
    # Not under the inference mode of whoever asks first, nor a default device of the user's.
    with torch.inference_mode(False), torch.device("cpu"):
        return _Tables(device)


def _table(kind: int, size: int) -> Tensor:
    return torch.tensor([signed(_factor(kind, index)) for index in range(size)])


@lru_cache(100_000)
def _factor(kind: int, index: int) -> int:
    """Return an odd number that looks random; a kind is a sequence of its own."""
    return _mix(_mix(kind) + index) | 1


def _mix(value: int) -> int:
    """Return 64 bits that look random, another number for each: the last steps of SplitMix64 (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) % _ALL
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % _ALL
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % _ALL
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """Return 64 bits as a signed integer, as tensors have it."""
    if value >= _ALL // 2:
        return value - _ALL
    return value
