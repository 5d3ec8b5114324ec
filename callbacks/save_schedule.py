"""When a ModelCheckpoint saves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .arguments import require, require_int
from .intervals import read_interval
from .monitor import acts_at_epoch_ends

if TYPE_CHECKING:
    from ..framework import Trainer
    from ..framework.checkpoint.token_count import TokenCount


class SaveSchedule:
    """When a checkpoint is due: after a number of optimizer steps or tokens, after some time, or some epochs.

    With none of them given, it is after each epoch.

    Args:
        every_n_train_steps: optimizer steps from one checkpoint to the next; 0 or None switches it off.
        train_time_interval: time from one to the next.
        every_n_epochs: epochs from one to the next; 0 switches it off.
        save_on_train_epoch_end: what is due after an epoch is saved at its end (True) or after its validation (False).
            None leaves it open, as told in :func:`~.monitor.acts_at_epoch_ends`.
        every: instead of the first three, an interval as text; see :func:`~.intervals.read_interval`.

    Attributes:
        every_n_train_steps, train_time_interval, every_n_epochs: as given; one of them, or the next one.
        every_n_tokens: tokens from one checkpoint to the next; 0 switches it off.
        is_within_epochs: whether checkpoints are due by steps, tokens or time, not by epochs.

    Raises:
        ValueError: if an argument is not as above, or two of the intervals are given.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        every: str | None = None,
    ) -> None:
        given = (every_n_train_steps, train_time_interval, every_n_epochs)
        tokens = None
        if every is not None:
            if given != (None, None, None):
                raise ValueError(
                    f"every={every!r} takes the place of every_n_train_steps, train_time_interval and every_n_epochs; "
                    f"got {', '.join(map(repr, given))} for these, too"
                )
            units = ("steps", "epochs", "seconds", "tokens")
            interval = read_interval("every", every, *units)
            every_n_train_steps = interval.count("steps")
            every_n_epochs = interval.count("epochs")
            tokens = interval.count("tokens")
            if interval.unit == "seconds":
                train_time_interval = timedelta(seconds=interval.amount)
        given = (every_n_train_steps, train_time_interval, every_n_epochs)
        self._check(*given)
        if (*given, tokens) == (None, None, None, None):
            every_n_epochs = 1
        self.every_n_train_steps = every_n_train_steps or 0
        self.every_n_epochs = every_n_epochs or 0
        self.every_n_tokens = tokens or 0
        self.train_time_interval = train_time_interval
        self.is_within_epochs = bool(
            self.every_n_train_steps
            or self.every_n_tokens
            or train_time_interval is not None
        )
        self._save_on_train_epoch_end = save_on_train_epoch_end
        # Seconds of the interval that had passed at the checkpoint from which the run goes on.
        self._resumed_seconds = 0.0
        self._clock: Callable[[], float] | None = None
        # When the interval began, on this clock.
        self._began = 0.0
        self._last_step = 0
        self._tokens: TokenCount | None = None
        # How many tokens make the next checkpoint due.
        self._next_tokens: float = 0
        self._has_validated = False

    @staticmethod
    def _check(steps: Any, interval: Any, epochs: Any) -> None:
        """Refuse numbers and times that are none, and several of them together."""
        for name, count in (
            ("every_n_train_steps", steps),
            ("every_n_epochs", epochs),
        ):
            if count is not None:
                require_int(
                    name,
                    count,
                    0,
                    "an int of at least 0, or None",
                )
        if interval is not None:
            valid = isinstance(interval, timedelta) and interval >= timedelta(0)
            accepted = "a datetime.timedelta of 0 or more"
            require(
                valid,
                "train_time_interval",
                accepted,
                interval,
            )
        if bool(steps) + bool(epochs) + (interval is not None) > 1:
            raise ValueError(
                "give one of every_n_train_steps, train_time_interval and every_n_epochs (for several, use several "
                f"ModelCheckpoints); got {steps!r}, {interval!r} and {epochs!r}"
            )

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

    def start(
        self, step: int, clock: Callable[[], float], tokens: TokenCount | None = None
    ) -> None:
        """Training begins.

        Args:
            step: the optimizer step that was done last.
            clock: tells the time in seconds, alike in all processes.
            tokens: counts tokens; needed for an interval of them.
        """
        self._tokens = tokens
        if self.every_n_tokens and tokens is not None:
            self._next_tokens = tokens.next_multiple(self.every_n_tokens)
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
        if self.every_n_tokens:
            return self._has_enough_tokens(step)
        if self.train_time_interval is None:
            return step % self.every_n_train_steps == 0
        assert self._clock is not None
        now = self._clock()
        if now - self._began < self.train_time_interval.total_seconds():
            return False
        self._began = now
        return True

    def _has_enough_tokens(self, step: int) -> bool:
        assert self._tokens is not None
        if not self._tokens.has_reached(self._next_tokens, step):
            return False
        self._next_tokens = self._tokens.next_multiple(self.every_n_tokens)
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
