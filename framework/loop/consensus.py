"""What the ranks of a training agree on while it runs: whether to end it, or the epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..data.iteration import INFINITE

if TYPE_CHECKING:
    from ...strategies import Strategy

# Between two agreements. A request takes effect within 2 s even where steps suddenly take four times as long.
SECONDS = 0.5


def _do_nothing() -> None:
    pass


class _Pace:
    """How often the ranks agree, in batches: about twice a second.

    Attributes:
        interval: batches between two agreements, the same on all ranks.
    """

    def __init__(self) -> None:
        self.interval = 1
        # Batch and time of the last agreement.
        self._last_batch = 0
        self._last_time = 0.0

    def begin(self, batch_idx: int) -> int:
        """Begin to count, after ``batch_idx`` batches; returns after which batch the next agreement is due."""
        self._last_batch = batch_idx
        self._last_time = time.monotonic()
        return batch_idx + self.interval

    def measure(self, batch_idx: int) -> int:
        """Return what this rank proposes as the interval, after ``batch_idx`` batches."""
        num_batches = batch_idx - self._last_batch
        seconds = max(time.monotonic() - self._last_time, 1e-6)
        if num_batches <= 0:
            return self.interval
        # At most twice as far as the last time, as the first steps tell little about the speed.
        return max(1, min(int(num_batches / seconds * SECONDS), 2 * num_batches))


class Consensus:
    """Requests of this rank, and what all ranks have agreed on. On a single rank, a request is an agreement.

    Several ranks agree about twice a second, in one all-reduce of five numbers. All of them do so after the same batch,
    as each agreement also says when the next one is due: after more batches where steps are quick.

    Args:
        strategy: has the ranks.
        alike: all ranks request the same after the same batch, so that a request is an agreement.

    Attributes:
        stop_requested, skip_requested: this rank asks to end the training, or to skip the rest of the epoch.
        stop, skip: all ranks do so.
        signal_requested: number of the signal that this rank has got and that asks it to end; 0 for none.
        signal: number of the signal on account of which all ranks end; 0 for none.
        saved_for_signal: whether a checkpoint was saved for it.
        due: batches of the epoch after which the next agreement is due; infinite on a single rank.
        evaluation_due: the same in a loader of a validation.
    """

    def __init__(self, strategy: Strategy, alike: bool = False) -> None:
        self.strategy = strategy
        self._alike = alike
        self.stop_requested = False
        self.stop = False
        self.skip_requested = False
        self.skip = False
        self.signal_requested = 0
        self.signal = 0
        self.saved_for_signal = False
        self.due: int | float = INFINITE
        self.evaluation_due: int | float = INFINITE
        self._wake: Callable[[], None] = _do_nothing
        self._pace = _Pace()
        self._evaluation_pace = _Pace()
        self._began = 0.0
        self._agreed_seconds = 0.0

    @property
    def _is_alone(self) -> bool:
        """Whether there is a single rank, which need not ask others."""
        return self._alike or self.strategy.world_size == 1

    def clock(self) -> float:
        """Seconds since the run began; with several ranks, until the last agreement, which is the same on all."""
        if self._is_alone:
            return time.monotonic() - self._began
        return self._agreed_seconds

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no run to wake.
        return {**self.__dict__, "_wake": _do_nothing}

    # Requests.

    def request_stop(self, stop: bool) -> None:
        """Ask to end the training, or take that back."""
        self.stop_requested = stop
        if self._is_alone:
            # A signal's stop is not for a hook to take back.
            self.stop = stop or bool(self.signal)
            self._wake()

    def withdraw_stop(self) -> None:
        """Go on, whatever was asked for and agreed on, unless a signal asks to end. All ranks call it."""
        self.stop_requested = False
        self.stop = bool(self.signal)

    def request_skip(self) -> bool:
        """Ask to skip the rest of the epoch; returns whether that is agreed already, as on a single rank."""
        self.skip_requested = True
        return self._is_alone

    def request_end_by_signal(self, number: int) -> None:
        """Ask to end for the signal ``number``, which this rank has got. Called from the signal's handler.

        The first one counts: a job that SLURM has warned by SIGUSR1 may get SIGTERM before it has ended.
        """
        number = self.signal_requested or number
        self.signal_requested = number
        if self._is_alone:
            self.signal = number
            self.stop = True
            self._wake()

    def note_saved_for_signal(self, saved: bool) -> None:
        """Note whether a checkpoint was saved on account of the signal."""
        self.saved_for_signal = saved

    # Agreements.

    def begin(self) -> None:
        """Begin a run: nobody has asked for anything."""
        self.stop_requested = False
        self.stop = False
        self.signal_requested = 0
        self.signal = 0
        self.saved_for_signal = False
        self._wake = _do_nothing
        self._began = time.monotonic()
        self._agreed_seconds = 0.0

    def begin_epoch(self, batch_idx: int, wake: Callable[[], None]) -> None:
        """Begin an epoch.

        Args:
            batch_idx: batches of it that are trained on already.
            wake: called when this rank requests something that need not wait for the others.
        """
        self.skip_requested = False
        self.skip = False
        self._wake = wake
        due = self._pace.begin(batch_idx)
        self.due = INFINITE if self._is_alone else due

    def begin_evaluation(self) -> None:
        """Begin a loader of a validation."""
        due = self._evaluation_pace.begin(0)
        self.evaluation_due = INFINITE if self._is_alone else due

    def agree(self, batch_idx: int) -> None:
        """Agree, after ``batch_idx`` batches of the epoch. A collective: all ranks call it after the same batch."""
        if not self._is_alone:
            self.due = self._agree(batch_idx, self._pace)

    def agree_in_evaluation(self, batch_idx: int) -> None:
        """Agree, after ``batch_idx`` batches of a validation loader. A collective, as :meth:`agree`."""
        if not self._is_alone:
            self.evaluation_due = self._agree(batch_idx, self._evaluation_pace)

    def _agree(self, batch_idx: int, pace: _Pace) -> int:
        """Agree; returns the batch after which the next agreement is due."""
        now = time.monotonic()
        # The largest of each number counts: so of the intervals, which are negative, the shortest.
        requests = [
            self.stop_requested,
            self.skip_requested,
            self.signal_requested,
            -pace.measure(batch_idx),
            int((now - self._began) * 1000),
        ]
        packed = torch.tensor(requests, dtype=torch.int64)
        agreed = self.strategy.reduce(packed, "max").tolist()  # collective
        self.signal = agreed[2]
        self.stop = bool(agreed[0] or self.signal)
        self.skip = bool(agreed[1])
        self._agreed_seconds = agreed[4] / 1000
        pace.interval = -agreed[3]
        return pace.begin(batch_idx)
