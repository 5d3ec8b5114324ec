from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest

from loopwright.callbacks import Callback, ModelCheckpoint, Timer
from tests.callbacks.scripted import Scripted, fit, loader, trainer

HOUR = 3600.0


def used_up(seconds: float) -> dict[str, Any]:
    """A state in which so much training time has passed."""
    return {
        "time_elapsed": {
            "train": seconds,
            "sanity_check": 0.0,
            "validate": 0.0,
            "test": 0.0,
            "predict": 0.0,
        }
    }


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("01:02:03:04", 93784.0),
        (" 00:00:00:05 ", 5.0),
        (timedelta(minutes=2), 120.0),
        ({"days": 1, "hours": 1}, 90000.0),
    ],
)
def test_forms_of_duration(duration: Any, seconds: float):
    assert Timer(duration).time_remaining() == seconds


def test_no_time_trains_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "loopwright"):
        assert fit(Timer(timedelta(0))).global_step == 0
    assert any(
        "Time limit reached. Elapsed time is 0:00:00" in message
        for message in caplog.messages
    )


class SpendsTwoHours(Callback):
    """Before the second step, lets a timer believe that two hours have passed."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def on_train_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            self.timer.load_state_dict(used_up(2 * HOUR))
            self.timer.on_train_start(trainer, module)  # as in a run resumed here
            trainer.should_stop = (
                False  # which would not have begun; the timer is to see for itself
            )


@pytest.mark.parametrize(("interval", "steps"), [("step", 2), ("epoch", 4)])
def test_training_ends_with_the_step_or_the_epoch_when_time_is_up(
    interval: str, steps: int
):
    timer = Timer(timedelta(hours=1), interval=interval, verbose=False)
    assert fit(SpendsTwoHours(timer), timer).global_step == steps


def test_a_run_without_duration_is_only_measured():
    timer: Any = Timer()
    run = fit(timer)
    assert run.global_step == 12
    assert timer.time_remaining() is None
    assert timer.time_elapsed() == pytest.approx(timer.end_time() - timer.start_time())
    assert timer.time_elapsed() > 0
    for stage in ("sanity_check", "validate"):
        assert timer.time_elapsed(stage) > 0
        assert timer.time_elapsed(stage) < timer.time_elapsed()
    assert timer.start_time("test") is None
    assert timer.time_elapsed("test") == 0
    run.test(dataloaders=loader(), verbose=False)
    run.predict(dataloaders=loader())
    assert timer.time_elapsed("test") > 0
    assert timer.time_elapsed("predict") > 0
    with pytest.raises(ValueError, match=r"stage must be one of 'train'.*'training'"):
        timer.time_elapsed("training")


def test_time_goes_on_in_a_resumed_run():
    first = Timer()
    resumed: Any = Timer(timedelta(hours=1))
    fit(first, ModelCheckpoint("kept"), max_epochs=1)
    fit(resumed, ckpt_path="kept/epoch=0-step=4.ckpt")
    assert resumed.time_elapsed() > resumed.end_time() - resumed.start_time()


def test_a_resumed_run_whose_time_was_used_up_trains_nothing():
    timer = Timer(timedelta(hours=1))
    timer.load_state_dict(used_up(HOUR))
    assert fit(timer).global_step == 0


def test_a_second_fit_adds_to_the_first():
    timer: Any = Timer()
    run = trainer(timer, max_epochs=1)
    run.fit(module := Scripted(), loader())
    first = timer.time_elapsed()
    run.max_epochs = 2
    run.fit(module, loader())
    assert timer.time_elapsed() == first + timer.end_time() - timer.start_time()


def test_measured_time_is_on_the_monotonic_clock():
    timer: Any = Timer()
    before = time.monotonic()
    fit(timer)
    assert before < timer.start_time() < timer.end_time() < time.monotonic()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration": "1:00"}, "duration must be 'DD:HH:MM:SS'.*'1:00'"),
        ({"duration": 5}, "duration must be .*5"),
        ({"duration": {"fortnights": 1}}, "duration must be .*fortnights"),
        ({"interval": "batch"}, "interval must be .*'batch'"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Timer(**arguments)


def test_a_sanity_check_counts_as_a_validation():
    """As long as nothing else has been validated."""
    timer = Timer()
    fit(timer, num_sanity_val_steps=2, max_steps=1)
    assert (
        0
        < timer.time_elapsed("validate")
        == pytest.approx(timer.time_elapsed("sanity_check"), abs=0.01)
    )
