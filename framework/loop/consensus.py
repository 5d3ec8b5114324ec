"""What the processes of a training agree on while it runs: whether to end it, or the epoch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ..data.iteration import INFINITE

if TYPE_CHECKING:
    from ...strategies import Strategy

SECONDS = 1.0  # between two agreements


class Control:
    """Requests of this process, and what all have agreed on. In one process, a request is an agreement.

    Several processes agree about once a second, in one all-reduce of a few numbers: the word. They do so at the same
    step, as the word says when the next one is due: sooner or later as steps are slow or quick.

    Attributes:
        wants_stop, wants_skip: this process asks to end the training, or the rest of the epoch.
        stop, skip: all do.
        wants_signal: the signal that this process has got and that asks it to end; 0 for none.
        signal: the one on account of which all end.
        saved_for_signal: whether a checkpoint was saved for it.
        due: batches of the epoch after which the next agreement is due; infinite in one process.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.wants_stop = self.stop = self.wants_skip = self.skip = False
        self.wants_signal = self.signal = 0
        self.saved_for_signal = False
        self.due: int | float = INFINITE
        self._interval = 1  # steps
        self._counted = 0  # the batches at the last agreement, and its time
        self._time = 0.0
        self._began = self._clock = 0.0

    def clock(self) -> float:
        """Seconds since the run began; with several processes, at the last agreement: the same in all of them."""
        return (
            time.monotonic() - self._began
            if self.strategy.world_size == 1
            else self._clock
        )

    def ask_to_stop(self, stop: bool) -> None:
        """Ask to end the training, or take that back."""
        self.wants_stop = stop
        if self.strategy.world_size == 1:
            self.stop = stop

    def note_signal(self, number: int) -> None:
        """This process has got a signal that asks it to end. Called from the signal's handler."""
        self.wants_signal = number
        if self.strategy.world_size == 1:
            self.signal = number
            self.stop = True

    def begin(self) -> None:
        """A run begins: nobody has asked for anything."""
        self.wants_stop = self.stop = False
        self.wants_signal = self.signal = 0
        self.saved_for_signal = False
        self._began, self._clock = time.monotonic(), 0.0

    def begin_epoch(self, batches: int) -> None:
        """An epoch begins at batch ``batches``."""
        self.wants_skip = self.skip = False
        self._counted, self._time = batches, time.monotonic()
        self.due = (
            batches + self._interval if self.strategy.world_size > 1 else INFINITE
        )

    def agree(self, batches: int) -> None:
        """Agree, after batch ``batches`` of the epoch; all processes call this at the same moments. A collective."""
        if self.strategy.world_size == 1:
            return
        now = time.monotonic()
        steps, seconds = batches - self._counted, max(now - self._time, 1e-6)
        if steps > 0:
            # At most twice as far as the last time, as the first steps tell little about the speed.
            self._interval = max(1, min(int(steps / seconds * SECONDS), 2 * steps))
        self._counted, self._time = batches, now
        milliseconds = int((now - self._began) * 1000)
        word = [
            self.wants_stop,
            self.wants_skip,
            -self._interval,
            milliseconds,
            self.wants_signal,
        ]
        agreed = self.strategy.reduce(
            torch.tensor(word, dtype=torch.int64), "max"
        ).tolist()
        stop, skip, interval, milliseconds, self.signal = agreed
        self.stop, self.skip = bool(stop or self.signal), bool(skip)
        self._interval, self._clock = -interval, milliseconds / 1000
        self.due = batches + self._interval
