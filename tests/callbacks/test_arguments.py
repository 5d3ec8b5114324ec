"""Wrong arguments of callbacks are errors that name them, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from loopwright.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    SpikeDetector,
    ThroughputMonitor,
)


@pytest.mark.parametrize(
    ("callback", "argument", "value"),
    [
        (BatchSizeFinder, "margin", "a"),
        (EMAWeightAveraging, "decay", True),
        (EMAWeightAveraging, "update_starting_at_step", "a"),
        (EMAWeightAveraging, "update_starting_at_epoch", -1),
        (LearningRateFinder, "min_lr", "a"),
        (LearningRateFinder, "min_lr", 2.0),
        (LearningRateFinder, "max_lr", None),
        (LearningRateFinder, "early_stop_threshold", "x"),
        (SpikeDetector, "threshold", "a"),
        (ThroughputMonitor, "batch_size_fn", 3),
        (ThroughputMonitor, "length_fn", 3),
    ],
)
def test_a_value_of_another_kind_is_named(
    callback: type[Callback], argument: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{argument}.* must be .*got {value!r}"):
        callback(**{argument: value})
