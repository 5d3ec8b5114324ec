"""Measure how long the stages of a run take, and end the training when its time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from logging import getLogger
from typing import TYPE_CHECKING, Any

from .arguments import require, require_choice
from .base import Callback
from .intervals import seconds_of

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class Timer(Callback):
    """Measure time, and end the training when ``duration`` is used up.

    The training time of a run that is resumed goes on from where the checkpoint left it, and so it does when ``fit``
    is called again.

    Args:
        duration: time for training: ``"DD:HH:MM:SS"``, ``"10 minutes"``, a ``datetime.timedelta`` or a dict of its
            arguments. None only measures.
        interval: look at the clock after each ``"step"``, or after each ``"epoch"`` to end with a whole one.
        verbose: say so when time is up.

    Raises:
        ValueError: if ``duration`` or ``interval`` is none of these.
    """

    phase = "decide"

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, float] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        require_choice("interval", interval, "step", "epoch")
        self._duration = None if duration is None else seconds_of("duration", duration)
        self._interval = interval
        self._verbose = verbose
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._seconds_before_fit = 0.0
        # Checked after each step, on the monotonic clock; infinite if only epochs are to be ended.
        self._deadline = math.inf

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage last began, on the clock of ``time.monotonic``; None if it has not."""
        return self._start.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage last ended, on the same clock; None if it has not."""
        return self._end.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds in a stage: in all of the training, or in the last evaluation of that kind."""
        before = self._seconds_before_fit if stage == "train" else 0.0
        start = self.start_time(stage)
        if start is None:
            return before
        end = self._end.get(stage)
        return before + (time.monotonic() if end is None else end) - start

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds of ``duration`` that a stage has left, negative if it took longer; None without a ``duration``."""
        if self._duration is None:
            return None
        return self._duration - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before_fit = state_dict["time_elapsed"]["train"]
        self._start.pop("train", None)
        self._end.pop("train", None)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._seconds_before_fit = self.time_elapsed()
        self._begin("train")
        if self._duration is not None:
            deadline = self._start["train"] + self._duration - self._seconds_before_fit
            self._deadline = deadline if self._interval == "step" else math.inf
            # It may have been used up before this run was resumed.
            if time.monotonic() >= deadline:
                self._stop(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if time.monotonic() >= self._deadline:
            self._deadline = math.inf
            # In this process; the Trainer lets all of them stop at the same step.
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._interval == "step" or self._duration is None:
            return
        # All processes go by the main one's clock.
        remaining = trainer.strategy.broadcast(self.time_remaining())  # collective
        if remaining <= 0:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end["train"] = time.monotonic()

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        if self._verbose and trainer.is_global_zero:
            elapsed = timedelta(seconds=int(self.time_elapsed()))
            log.info(
                "Time limit reached. Elapsed time is %s. Signaling Trainer to stop.",
                elapsed,
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        for stage in _kinds(trainer):
            self._begin(stage)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        for stage in _kinds(trainer):
            self._end[stage] = time.monotonic()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _begin(self, stage: str) -> None:
        self._start[stage] = time.monotonic()
        self._end.pop(stage, None)


class MaxTime(Timer):
    """The Timer of ``Trainer(max_time=…)``: a class of its own, so that others may stand beside it."""


def _kinds(trainer: Trainer) -> tuple[str, ...]:
    """The stages for which the running evaluation counts; a sanity check is a validation, too."""
    stage = str(trainer.state.stage)
    return (stage, "validate") if stage == "sanity_check" else (stage,)


def _known(stage: str) -> str:
    stages = ", ".join(map(repr, _STAGES))
    require(stage in _STAGES, "stage", f"one of {stages}", stage)
    return stage
