"""Where in an epoch a loader is, which part of it is read, and how a checkpoint holds that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from loopwright.framework.data.iteration import INFINITE
from loopwright.framework.data.position import WHOLE_EPOCH, Segment
from loopwright.framework.data.sharding import ShardedLoader
from loopwright.strategies import SingleDeviceStrategy

ORDER = [7, 3, 9, 1, 5]


@pytest.mark.parametrize(
    ("segment", "inside", "seeds"),
    [
        (WHOLE_EPOCH, [7, 3, 9, 1, 5], ()),
        (Segment(first_batch=1, begin=2), [9, 1, 5], (2,)),
        (Segment(first_batch=1, begin=2, end=4), [9, 1], (2,)),
        (Segment(first_batch=1, end=4), [7, 3, 9, 1], ()),
        (Segment(first_batch=3, begin=5), [], (5,)),
        (Segment(first_batch=3, begin=4, end=2), [], (4,)),
    ],
)
def test_a_segment(segment: Segment, inside: list[int], seeds: tuple[int, ...]):
    assert segment.slice(ORDER) == inside
    assert segment.length_of(len(ORDER)) == len(inside)
    assert segment.seeds == seeds
    assert Segment.from_state(segment.state_dict()) == segment


def test_what_checkpoints_hold():
    assert WHOLE_EPOCH.state_dict() is None
    assert Segment(2, 16, 24).state_dict() == {"first": 2, "begin": 16, "end": 24}


def test_without_length():
    assert WHOLE_EPOCH.length_of(INFINITE) == INFINITE
    assert Segment(begin=3, end=8).length_of(INFINITE) == 5


def sharded(batch_size: int = 2, seed: int = 1) -> ShardedLoader:
    samples = list(range(10))
    loader = DataLoader(samples, batch_size, shuffle=True)  # type: ignore[arg-type]
    return ShardedLoader(loader, SingleDeviceStrategy(), seed)


def plain(batches: Iterator[Any]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_a_loader_goes_on_from_its_position():
    whole = sharded()
    whole.begin_epoch(3)
    expected = plain(whole.iterate())
    resumed = sharded()
    resumed.load_state_dict(whole.state_dict(2))
    assert resumed.epoch == 3
    assert resumed.segment == WHOLE_EPOCH
    assert plain(resumed.iterate(2)) == expected[2:]


def test_a_loader_of_other_batches_reads_the_rest_as_a_segment():
    whole = sharded(batch_size=2)
    order = [number for batch in plain(whole.iterate()) for number in batch]
    resumed = sharded(batch_size=3)
    resumed.load_state_dict(whole.state_dict(2))
    assert resumed.segment == Segment(first_batch=2, begin=4)
    assert resumed.epoch_length == 2 + 2
    assert plain(resumed.iterate(2)) == [order[4:7], order[7:]]
    again = sharded(batch_size=3)
    again.load_state_dict(resumed.state_dict(3))
    assert plain(again.iterate(3)) == [order[7:]]


def test_what_checkpoints_hold_of_a_position():
    loader = sharded()
    assert loader.state_dict(2, limit=4) == {
        "epoch": 0,
        "batches": 2,
        "loader": None,
        "part": None,
        "cursor": {
            "position": 4,
            "end": 8,
            "in_samples": True,
            "batch_sizes": [2],
            "dealt": True,
            "dealt_to": 1,
        },
    }
