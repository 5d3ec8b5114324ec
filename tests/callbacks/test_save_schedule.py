"""When a checkpoint is due, and which ones are kept, without a Trainer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from loopwright.callbacks.checkpoint_record import CheckpointRecord
from loopwright.callbacks.monitor import worst_value
from loopwright.callbacks.save_schedule import SaveSchedule


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({}, [], [0, 1, 2, 3]),
        ({"every_n_epochs": 2}, [], [1, 3]),
        ({"every_n_epochs": 0}, [], []),
        ({"every_n_train_steps": 3}, [3, 6], []),
        ({"train_time_interval": timedelta(seconds=2)}, [2, 4, 6], []),
    ],
)
def test_when_a_checkpoint_is_due(
    arguments: dict[str, Any], steps: list[int], epochs: list[int]
):
    """A step takes a second; each step is asked for twice, as inside an accumulation window."""
    schedule = SaveSchedule(**arguments)
    now = 100.0
    schedule.start(0, lambda: now)
    due = []
    for step in (1, 2, 3, 4, 5, 6):
        now += 1.0
        due += [step for _ in range(2) if schedule.is_due_after_step(step)]
    assert due == steps
    assert [epoch for epoch in range(4) if schedule.is_due_after_epoch(epoch)] == epochs
    assert schedule.is_within_epochs == bool(steps)


def test_an_interval_goes_on_in_a_resumed_run_and_begins_anew_in_the_next_fit():
    schedule = SaveSchedule(train_time_interval=timedelta(seconds=10))
    schedule.resume(7.0)
    assert schedule.elapsed_seconds == 7.0
    now = 1000.0
    schedule.start(0, lambda: now)
    now += 2.0
    assert not schedule.is_due_after_step(1)
    now += 1.0
    assert schedule.is_due_after_step(2)
    now += 4.0
    assert schedule.elapsed_seconds == 4.0
    schedule.start(2, lambda: now)
    assert schedule.elapsed_seconds == 0.0


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("min", (2.0, 1.0, 3.0), {"a": 2.0, "b": 1.0}),
        ("max", (2.0, 1.0, 3.0), {"a": 2.0, "c": 3.0}),
        # Of equally bad ones the oldest goes first, and an equal one is no better.
        ("min", (2.0, 2.0, 1.0), {"b": 2.0, "c": 1.0}),
        ("min", (2.0, 2.0, 2.0), {"a": 2.0, "b": 2.0}),
        ("max", (float("nan"), 1.0, float("nan")), {"a": float("-inf"), "b": 1.0}),
    ],
)
def test_which_two_are_kept(
    mode: str, scores: tuple[float, ...], kept: dict[str, float]
):
    record = first = CheckpointRecord(kth_value=worst_value(mode))
    for path, score in zip("abc", map(torch.tensor, scores), strict=True):
        if record.ranks(score, mode, 2):
            record = record.with_ranked(path, score, mode, 2)
    assert {path: float(score) for path, score in record.best_k_models.items()} == kept
    best = min if mode == "min" else max
    assert record.best_model_score == best(kept.values())
    assert record.kth_value == (max if mode == "min" else min)(kept.values())
    assert first == CheckpointRecord(kth_value=first.kth_value)


def test_in_another_folder_only_the_best_path_is_taken_over():
    saved = CheckpointRecord(
        worst_value("min"), best_model_path="old/a", last_model_path="old/last"
    )
    fresh = CheckpointRecord(kth_value=worst_value("min"))
    assert fresh.restored(saved.state_dict(), same_folder=True) == saved
    moved = fresh.restored(saved.state_dict(), same_folder=False)
    assert (moved.best_model_path, moved.last_model_path) == ("old/a", "")


def test_what_is_removed():
    record = CheckpointRecord(
        worst_value("min"),
        best_model_path="a",
        last_checkpoint_saved="b",
        removable=["a", "b", "c", "d"],
    )
    assert record.unneeded(resumed_from="d") == ["c"]
