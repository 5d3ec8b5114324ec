"""What a checkpoint holds: the shape that is required, and how format 1 is given it."""

from __future__ import annotations

from typing import Any, TypedDict

import pytest

from loopwright.framework.checkpoint.format_1 import upgrade
from loopwright.framework.checkpoint.schema import RunState, check_shape
from loopwright.framework.checkpoint.stages import TrainerFn


class Inner(TypedDict):
    count: int


class Outer(TypedDict, total=False):
    inner: Inner
    items: list[Inner]
    by_name: dict[str, Inner]
    maybe: Inner | None
    anything: Any


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"inner": {"count": 1, "more": 2}, "unknown": 3},
        {"items": [{"count": 1}], "by_name": {"a": {"count": 2}}},
        {"maybe": None, "anything": object()},
        {"maybe": {"count": 0}},
    ],
)
def test_what_has_the_shape(value: dict[str, Any]):
    check_shape(value, Outer)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([], TypeError, r"checkpoint is \[\]"),
        ({"inner": {}}, KeyError, "count"),
        ({"inner": {"count": True}}, TypeError, r"checkpoint\.inner\.count is True"),
        ({"inner": {"count": float("nan")}}, TypeError, "count is nan"),
        ({"items": {}}, TypeError, "items is {}"),
        ({"items": [1]}, TypeError, "items is 1"),
        ({"by_name": {"a": None}}, TypeError, r"by_name\.a is None"),
        ({"maybe": 3}, TypeError, "maybe is 3"),
    ],
)
def test_what_has_not(value: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        check_shape(value, Outer)


def test_counters_come_back():
    state, again = RunState(epoch=2, batch_idx=3, fn=TrainerFn.FITTING), RunState()
    again.load_state_dict(state.state_dict())
    assert (again.epoch, again.batch_idx, again.fn) == (2, 3, None)


@pytest.mark.parametrize("epoch_done", [False, True])
def test_what_format_1_had_of_each_rank(epoch_done: bool):
    """A loader whose epoch is done goes on with the next one."""
    counters = {**RunState(epoch=1, batch_idx=4).state_dict(), "epoch_done": epoch_done}
    main, peer = (
        {"metrics": rank, "metric_states": {}, "loader": rank, "cursor": None}
        for rank in ("main", "peer")
    )
    checkpoint = {
        "run": {"state": counters, **main, "saved_by": 2, "peers": [peer]},
        "loaders": "a user's",
    }
    upgrade(checkpoint)
    expected = (2, 0) if epoch_done else (1, 4)
    for rank, [loader] in zip(
        ("main", "peer"), checkpoint["loader_states"], strict=True
    ):
        assert (loader["epoch"], loader["batches"], loader["loader"]) == (
            *expected,
            rank,
        )
    assert [logged["metrics"] for logged in checkpoint["run"]["logged"]] == [
        "main",
        "peer",
    ]
    assert checkpoint["run"]["saved_by"] == 2
    assert checkpoint["loaders"] == "a user's"


def test_an_engines_loaders_of_format_1():
    checkpoint: dict[str, Any] = {"registered": [], "loaders": [["state"]]}
    upgrade(checkpoint)
    assert checkpoint == {"registered": [], "loader_states": [["state"]]}
