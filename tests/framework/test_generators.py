"""Random generators of a stream's own: they and the process's draw as if the others were not there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from loopwright.framework.data import generators
from loopwright.framework.data.generators import Generators
from loopwright.framework.seed import rng_state, seed_batch


@pytest.fixture(params=["in memory", "by functions"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the generators are exchanged; the second way is that of versions of libraries that are not known."""
    if request.param == "by functions":
        monkeypatch.setattr(generators, "_offsets", lambda: None)
    elif generators._offsets() is None:
        pytest.skip("these versions of Python, NumPy or torch are not known")
    return request.param


def drawn(number: int) -> list[float]:
    """Numbers of all kinds; of pairs of normal numbers, the second is kept, by each library in its own place."""
    return [
        float(value)
        for _ in range(number % 3)
        for value in (
            random.random(),
            random.gauss(0.0, 1.0),
            numpy.random.rand(),
            numpy.random.randn(),
            numpy.random.beta(0.4, 0.4),
            torch.rand(()),
            torch.randn(()),
            torch.randn((), dtype=torch.float64),
        )
    ]


def stream() -> Iterator[list[float]]:
    # Long enough for each generator to make new words several times.
    return (drawn(number) for number in range(600))


def plain(state: dict[str, Any]) -> list[Any]:
    *words, has_gauss, gauss = state["numpy"]
    words = [list(item) if hasattr(item, "__len__") else item for item in words]
    return [state["python"], state["torch"].tolist(), words, has_gauss, gauss]


def test_a_stream_and_the_process_draw_as_if_they_were_alone():
    seed_batch(5)
    alone, left = list(stream()), rng_state()
    seed_batch(7)
    own = [drawn(number + 1) for number in range(600)]
    own_left = rng_state()

    seed_batch(7)
    of_stream, of_process = [], []
    mine = Generators(5)
    for number, batch in enumerate(mine.iterate(stream())):
        of_stream.append(batch)
        of_process.append(drawn(number + 1))

    assert of_stream == alone
    assert of_process == own
    assert plain(rng_state()) == plain(own_left)
    with mine:
        assert plain(rng_state()) == plain(left)


def test_an_error_of_the_stream_leaves_the_process_with_its_own():
    def failing() -> Iterator[float]:
        yield random.random()
        drawn(2)
        raise OSError("gone")

    seed_batch(3)
    batches = Generators(1).iterate(failing())
    next(batches)
    before = plain(rng_state())
    with pytest.raises(OSError, match="gone"):
        next(batches)
    assert plain(rng_state()) == before


def test_a_bit_generator_that_is_no_twister_is_kept(way: str):
    if way == "by functions":
        pytest.skip("NumPy's functions refuse it, with a warning that says so")
    numpy_random: Any = numpy.random
    before = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(numpy.random.PCG64(1))
    try:
        expected = numpy.random.RandomState(numpy.random.PCG64(1)).random_sample(2)
        given = [numpy.random.random_sample()]
        with Generators(3):
            numpy.random.random_sample(3)
        given.append(numpy.random.random_sample())
        assert given == list(expected)
    finally:
        numpy_random.set_bit_generator(before)
