"""When a ModelCheckpoint saves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from .arguments import require, require_int
from .monitor import acts_at_epoch_ends

if TYPE_CHECKING:
    from ..framework import Trainer


class SaveSchedule:
    """When a checkpoint is due: after a number of optimizer steps, after some time, or after a number of epochs.

    With none of them given, it is after each epoch.

    Args:
        every_n_train_steps: optimizer steps from one checkpoint to the next; 0 or None switches it off.
        train_time_interval: time from one to the next.
        every_n_epochs: epochs from one to the next; 0 switches it off.
        save_on_train_epoch_end: what is due after an epoch is saved at its end (True) or after its validation (False).
            None leaves it open, as told in :func:`~.monitor.acts_at_epoch_ends`.

    Attributes:
        is_within_epochs: whether checkpoints are due by steps or time, not by epochs.

    Raises:
        ValueError: if an argument is not as above, or two of the first three are given.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
    ) -> None:
        for name, count in (
            ("every_n_train_steps", every_n_train_steps),
            ("every_n_epochs", every_n_epochs),
        ):
            if count is not None:
                require_int(
                    name,
                    count,
                    0,
                    "an int of at least 0, or None",
                )
        interval = train_time_interval
        if interval is not None:
            valid = isinstance(interval, timedelta) and interval >= timedelta(0)
            accepted = "a datetime.timedelta of 0 or more"
            require(
                valid,
                "train_time_interval",
                accepted,
                interval,
            )
        steps, epochs = every_n_train_steps or 0, every_n_epochs or 0
        if bool(steps) + bool(epochs) + (interval is not None) > 1:
            raise ValueError(
                "give one of every_n_train_steps, train_time_interval and every_n_epochs (for several, use several "
                f"ModelCheckpoints); got {every_n_train_steps!r}, {interval!r} and {every_n_epochs!r}"
            )
        if (every_n_train_steps, interval, every_n_epochs) == (None, None, None):
            epochs = 1
        self.every_n_train_steps = steps
        self.every_n_epochs = epochs
        self.train_time_interval = interval
        self.is_within_epochs = steps > 0 or interval is not None
        self._save_on_train_epoch_end = save_on_train_epoch_end
        # Seconds of the interval that had passed at the checkpoint from which the run goes on.
        self._resumed_seconds = 0.0
        self._clock: Callable[[], float] | None = None
        # When the interval began, on this clock.
        self._began = 0.0
        self._last_step = 0
        self._has_validated = False

    @property
    def elapsed_seconds(self) -> float | None:
        """Seconds since the interval began, without those between two runs; None if there is no interval."""
        if self.train_time_interval is None:
            return None
        if self._clock is None:
            return self._resumed_seconds
        return self._clock() - self._began

    def resume(self, elapsed_seconds: float | None) -> None:
        """Let :meth:`start` go on with an interval of which so much has passed."""
        self._resumed_seconds = elapsed_seconds or 0.0
        self._clock = None

    def start(self, step: int, clock: Callable[[], float]) -> None:
        """Training begins.

        Args:
            step: the optimizer step that was done last.
            clock: tells the time in seconds, alike in all processes.
        """
        self._last_step = step
        self._has_validated = False
        self._clock = clock
        self._began = clock() - self._resumed_seconds
        # When training begins again, so does the interval.
        self._resumed_seconds = 0.0

    def is_due_after_step(self, step: int) -> bool:
        """Whether a checkpoint is due after optimizer step ``step``; asked again for the same step, it is not."""
        if not self.is_within_epochs or step == self._last_step:
            return False
        self._last_step = step
        if self.train_time_interval is None:
            return step % self.every_n_train_steps == 0
        assert self._clock is not None
        now = self._clock()
        if now - self._began < self.train_time_interval.total_seconds():
            return False
        self._began = now
        return True

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether a checkpoint is due after the epoch with this index, counted from 0."""
        return self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0

    def saves_at_epoch_ends(self, trainer: Trainer) -> bool:
        """Whether what is due after an epoch is saved at its end, rather than after a validation."""
        return acts_at_epoch_ends(trainer, self._save_on_train_epoch_end)

    def note_validation(self) -> None:
        """A validation has ended."""
        self._has_validated = True

    def awaits_validation(self, trainer: Trainer) -> bool:
        """Whether the first validation is still to come, which may log what nobody has logged yet."""
        return trainer.enable_validation and not self._has_validated
