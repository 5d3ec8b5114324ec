"""What a bare training step may cost, in counts; times are measured by `make bench`."""

from __future__ import annotations

import pytest

from benchmarks.calls import MAX_CALLS, MAX_FRAMES, Counts, count


@pytest.fixture
def ours() -> Counts:
    return count("loopwright")


def test_few_frames_lie_between_fit_and_the_users_step(ours: Counts):
    assert 0 < ours.frames <= MAX_FRAMES, (
        "fewer hops: whoever debugs a step reads all of them"
    )


def test_a_bare_step_calls_few_python_functions(ours: Counts):
    assert ours.calls <= MAX_CALLS


def test_a_bare_step_calls_hardly_more_than_a_loop_by_hand(ours: Counts):
    assert ours.calls - count("raw").calls <= 20, "what nobody overrides is not called"
