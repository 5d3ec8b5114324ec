"""Random generators of a stream's own, which take the place of the process's while the stream is read.

Python's, NumPy's and torch's CPU generator are Mersenne Twisters of 2.5 kB each. To get and set their states by the
libraries' functions takes 0.2 ms a batch, which is more than many steps. So they are exchanged in memory, which takes
2 µs. Where the states lie is found out with generators made for that, and tried on them: if anything differs from what
the libraries' functions tell, as in another version of them, those functions are used.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from ..seed import rng_state, seed_batch, set_rng_state

# Stands for a batch that is not there, as a loader may give None.
NO_BATCH = object()

# Python's position and 624 words, in bytes.
_TWISTER = 4 + 4 * 624
# torch's seed, how many words are left, whether it is seeded, which word is next; the words; then the other halves of
# pairs of normal numbers, of single and double precision, each with whether there is one.
_TORCH_SIZE = 8 + 4 + 4 + 4 + 4 * 624 + 4 + 8 + 16
# NumPy's other half of a pair: whether there is one and, aligned, the number.
_GAUSS_SIZE = 16


def _memory(address: int, size: int) -> memoryview:
    """Bytes at an address, to be read and written. Whoever owns them must live on."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


# Where each library's state lies ------------------------------------------------------------------------------


@cache
def _offsets() -> tuple[int, int, int] | None:
    """Where in Python's, NumPy's and torch's objects their states begin, in bytes; None if one is not found."""
    numpy: Any = sys.modules.get("numpy")
    if sys.implementation.name != "cpython" or numpy is None:
        return None
    try:
        return _python_offset(), _numpy_offset(numpy), _torch_offset()
    except (AttributeError, ValueError):
        return None


def _python_offset() -> int:
    probe = random.Random(1)
    other = random.Random(2)
    _, (*words, position), _ = probe.getstate()
    start = struct.pack("=i4I", position, *words[:4])
    size = object.__basicsize__ + len(start)
    return _find((probe, other), id, size, start, _TWISTER, lambda it: it.getstate())


def _numpy_offset(numpy: Any) -> int:
    probe = numpy.random.RandomState(1)
    other = numpy.random.RandomState(1)
    probe.standard_normal()
    start = struct.pack("=qd", *probe.get_state()[3:])
    size = numpy.random.RandomState.__basicsize__
    return _find(
        (probe, other), id, size, start, _GAUSS_SIZE, lambda it: it.get_state()[3:]
    )


def _torch_offset() -> int:
    seed = 0x5EED_5EED_5EED
    probe = torch.Generator().manual_seed(seed)
    other = torch.Generator()
    for dtype in (torch.float32, torch.float64):
        torch.empty(1, dtype=dtype).normal_(generator=probe)
    return _find(
        (probe, other),
        lambda it: it._cdata,
        256,
        struct.pack("=q", seed),
        _TORCH_SIZE,
        lambda it: it.get_state().tolist(),
    )


def _find(
    generators: tuple[Any, Any],
    address: Callable[[Any], int],
    within: int,
    start: bytes,
    size: int,
    state: Callable[[Any], Any],
) -> int:
    """Where in an object its state lies.

    Args:
        generators: one that is looked at, and another one, to try on it what was found.
        address: where such an object is in memory.
        within: how many bytes to look through.
        start: what the state begins with.
        size: its length in bytes.
        state: what the library tells of the state.

    Raises:
        ValueError: if it is not there, or not all.
    """
    probe, other = generators
    offset = ctypes.string_at(address(probe), within).index(start)
    found = _memory(address(probe) + offset, size)
    _memory(address(other) + offset, size)[:] = found
    if state(other) != state(probe):
        raise ValueError
    return offset


class _Swap:
    """Exchanges the process's generators for others, in memory.

    Args:
        offsets: where the states are.
    """

    def __init__(self, offsets: tuple[int, int, int]) -> None:
        python_offset, numpy_offset, torch_offset = offsets
        numpy: Any = sys.modules["numpy"]
        default: Any = torch.default_generator
        self._python: Any = vars(random)["_inst"]
        places = (
            _memory(id(self._python) + python_offset, _TWISTER),
            _memory(default._cdata + torch_offset, _TORCH_SIZE),
        )
        # Python's and torch's states: where they are, what comes there next, and room for what leaves.
        self._next = [
            (live, memoryview(bytearray(live)), memoryview(bytearray(live)))
            for live in places
        ]
        self._then = [(live, room, coming) for live, coming, room in self._next]
        # NumPy's words are in an object that can be exchanged.
        self._get = numpy.random.get_bit_generator
        self._put = numpy.random.set_bit_generator
        address = id(numpy.random.random.__self__) + numpy_offset
        self._gauss = _memory(address, _GAUSS_SIZE)
        self._has_gauss = self._gauss.cast("i")
        self._kept: Any = (None, numpy.random.MT19937(0), b"")

    def exchange(self) -> None:
        """Put those that are kept in the place of the process's, and keep these."""
        for live, coming, room in self._next:
            room[:] = live
            live[:] = coming
        self._next, self._then = self._then, self._next
        python = self._python
        half, words, gauss = self._kept
        # The other halves of pairs of normal numbers, which NumPy forgets as its words are exchanged.
        own_gauss = self._gauss.tobytes() if self._has_gauss[0] else b""
        self._kept = (python.gauss_next, self._get(), own_gauss)
        python.gauss_next = half
        self._put(words)
        if gauss:
            self._gauss[:] = gauss


class _SwapByFunctions:
    """As :class:`_Swap`, by what the libraries offer: in any version of them, and 100 times slower."""

    def __init__(self) -> None:
        self._kept = rng_state()

    def exchange(self) -> None:
        """Put those that are kept in the place of the process's, and keep these."""
        coming = self._kept
        self._kept = rng_state()
        set_rng_state(coming)


class Generators:
    """Random generators that take the place of the process's within ``with``, and go on where they were the next time.

    Those of accelerators stay: they belong to the training step.

    Args:
        seed: what they are seeded with.
    """

    def __init__(self, seed: int) -> None:
        offsets = _offsets()
        swap = _Swap(offsets) if offsets else _SwapByFunctions()
        self._exchange = swap.exchange
        with self:
            seed_batch(seed)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *exception: object) -> None:
        self._exchange()

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, each made with these generators."""
        exchange = self._exchange
        while True:
            exchange()
            try:
                batch = next(batches, NO_BATCH)
            finally:
                exchange()
            if batch is NO_BATCH:
                return
            yield batch
