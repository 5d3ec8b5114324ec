"""A process that the others wait for is told, once."""

from __future__ import annotations

import logging

import pytest
import torch.distributed as dist

from loopwright.strategies.launch.stragglers import WINDOW, Stragglers


@pytest.mark.parametrize(
    ("waits", "named"),
    [((0.9, 0.2, 0.85), 1), ((0.5, 0.4, 0.6), None), ((0.1, 0.9, 0.2), None)],
    ids=["one is slow", "all are alike", "one of them waits"],
)
def test_who_is_slower_is_told_once(
    waits: tuple[float, ...], named: int | None, caplog: pytest.LogCaptureFixture
):
    store = vars(dist)["HashStore"]()
    ranks = [Stragglers(rank, 3, lambda: store) for rank in range(3)]
    with caplog.at_level(logging.WARNING, "loopwright"):
        for _ in range(3):
            # Rank 0 compares when all have told.
            for stragglers in reversed(ranks):
                share = waits[stragglers.rank]
                for look in range(WINDOW):
                    place = f"step {look}, in training_step of Net"
                    stragglers.note(place, waits=look < share * WINDOW)
    told = [record.getMessage() for record in caplog.records]
    if named is None:
        assert told == []
    else:
        [line] = told
        assert line.startswith(f"Rank {named} of 3 is slower than the others")
        assert "at least 85 %, it in 20 %" in line
        assert line.endswith("at work at step 59, in training_step of Net")
