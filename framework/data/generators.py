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
from typing import Any, NamedTuple

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
_NO_GAUSS = bytes(_GAUSS_SIZE)


def _memory(address: int, size: int) -> memoryview:
    """Bytes at an address, to be read and written. Whoever owns them must live on."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


# Where each library's state lies ------------------------------------------------------------------------------


class _Offsets(NamedTuple):
    """Where in the libraries' objects their states begin, in bytes."""

    python: int
    numpy: int
    torch: int


@cache
def _offsets() -> _Offsets | None:
    """Where the states are; None if one of them is not found."""
    numpy: Any = sys.modules.get("numpy")
    if sys.implementation.name != "cpython" or numpy is None:
        return None
    try:
        return _Offsets(_python_offset(), _numpy_offset(numpy), _torch_offset())
    except (AttributeError, ValueError):
        return None


def _python_offset() -> int:
    probe, other = random.Random(1), random.Random(2)
    _, (*words, position), _ = probe.getstate()
    start = struct.pack("=i4I", position, *words[:4])
    size = object.__basicsize__ + len(start)
    return _find((probe, other), id, size, start, _TWISTER, lambda it: it.getstate())


def _numpy_offset(numpy: Any) -> int:
    probe, other = numpy.random.RandomState(1), numpy.random.RandomState(1)
    probe.standard_normal()
    start = struct.pack("=qd", *probe.get_state()[3:])
    size = numpy.random.RandomState.__basicsize__
    return _find(
        (probe, other), id, size, start, _GAUSS_SIZE, lambda it: it.get_state()[3:]
    )


def _torch_offset() -> int:
    seed = 0x5EED_5EED_5EED
    probe, other = torch.Generator().manual_seed(seed), torch.Generator()
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

    Raises:
        NotImplementedError: if their states are not where they are expected.
    """

    def __init__(self) -> None:
        draw: Any = random.random
        python = draw.__self__
        offsets = _offsets()
        if offsets is None or type(python) is not random.Random:
            raise NotImplementedError
        default: Any = torch.default_generator
        places = (
            _memory(id(python) + offsets.python, _TWISTER),
            _memory(default._cdata + offsets.torch, _TORCH_SIZE),
        )
        # Of Python's and torch's generators: the process's, our state, and the process's while ours is in its place.
        self._twisters = [
            (live, memoryview(bytearray(live)), memoryview(bytearray(live)))
            for live in places
        ]
        # Beside the words, Python keeps the other half of a pair of normal numbers.
        self._python: Any = python
        self._half: Any = None
        self._their_half: Any = None
        # NumPy's words are in an object that can be exchanged. The other half of a pair, which is forgotten then, is
        # in memory: 8 bytes that tell whether there is one, and the number.
        numpy_random: Any = sys.modules["numpy"].random
        self._get = numpy_random.get_bit_generator
        self._put = numpy_random.set_bit_generator
        self._own = numpy_random.MT19937(0)
        self._theirs: Any = None
        address = id(numpy_random.random.__self__) + offsets.numpy
        self._gauss = _memory(address, _GAUSS_SIZE)
        self._has_gauss = self._gauss.cast("i")
        self._own_gauss = _NO_GAUSS
        self._their_gauss = _NO_GAUSS

    def enter(self) -> None:
        """Put ours in the place of the process's."""
        for live, ours, theirs in self._twisters:
            theirs[:] = live
            live[:] = ours
        self._their_half = self._python.gauss_next
        self._python.gauss_next = self._half
        self._theirs = self._get()
        if self._has_gauss[0]:
            self._their_gauss = bytes(self._gauss)
        self._put(self._own)
        if self._own_gauss is not _NO_GAUSS:
            self._gauss[:] = self._own_gauss

    def leave(self) -> None:
        """Put the process's back."""
        for live, ours, theirs in self._twisters:
            ours[:] = live
            live[:] = theirs
        self._half = self._python.gauss_next
        self._python.gauss_next = self._their_half
        self._own = self._get()
        self._own_gauss = bytes(self._gauss) if self._has_gauss[0] else _NO_GAUSS
        self._put(self._theirs)
        if self._their_gauss is not _NO_GAUSS:
            self._gauss[:] = self._their_gauss
            self._their_gauss = _NO_GAUSS


class _SwapByFunctions:
    """As :class:`_Swap`, by what the libraries offer: in any version of them, and 100 times slower."""

    def __init__(self) -> None:
        self._ours = rng_state()
        self._theirs = self._ours

    def enter(self) -> None:
        """Put ours in the place of the process's."""
        self._theirs = rng_state()
        set_rng_state(self._ours)

    def leave(self) -> None:
        """Put the process's back."""
        self._ours = rng_state()
        set_rng_state(self._theirs)


class Generators:
    """Random generators that take the place of the process's within ``with``, and go on where they were the next time.

    Those of accelerators stay: they belong to the training step.

    Args:
        seed: what they are seeded with.
    """

    def __init__(self, seed: int) -> None:
        self._swap: Any
        try:
            self._swap = _Swap()
        except NotImplementedError:
            self._swap = _SwapByFunctions()
        with self:
            seed_batch(seed)

    def __enter__(self) -> None:
        self._swap.enter()

    def __exit__(self, *exception: object) -> None:
        self._swap.leave()

    def state(self) -> dict[str, Any]:
        """Where they are, as :func:`~.seed.rng_state` tells it."""
        with self:
            return rng_state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        with self:
            set_rng_state(state)

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, each made with these generators."""
        enter, leave = self._swap.enter, self._swap.leave
        while True:
            enter()
            try:
                batch = next(batches, NO_BATCH)
            finally:
                leave()
            if batch is NO_BATCH:
                return
            yield batch
