"""Which part of an epoch is read, and how a checkpoint holds it."""

from __future__ import annotations

import pytest

from loopwright.framework.data.iteration import INFINITE
from loopwright.framework.data.position import WHOLE_EPOCH, Segment

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
