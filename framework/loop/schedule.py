"""When what is due in a fit: its validations, agreements among ranks, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.schema import ValidationMark
from ..data.iteration import INFINITE
from .validation_interval import ValidationInterval

if TYPE_CHECKING:
    from .run import Run


class Schedule:
    """The rules by which a fit validates, agrees and ends, and one alarm for all of them: :attr:`due`.

    Attributes:
        due: batches of the epoch after which anything but training is due, at the earliest: a validation, an agreement
            of the ranks, ``max_steps`` or the epoch's end. A request, such as ``should_stop``, sets it to 0.
        length: batches of the epoch; infinite while that is not certain.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.due: int | float = 0
        self.length: int | float = INFINITE
        self._max_steps: int | float = INFINITE
        self._validate_every: int | float = INFINITE
        # Batches after which a validation was due last, and is due next.
        self._last_validation: int | float = 0
        self._next_validation: int | float = INFINITE
        # Optimizer steps when the epoch began; None if another run began it.
        self._steps_before: int | None = None
        self._by_progress: ValidationInterval | None = None
        if run.trainer.validation_interval is not None:
            self._by_progress = ValidationInterval(run, run.trainer.validation_interval)

    # The end of the training.

    def is_over(self) -> bool:
        """Whether ``max_epochs`` or ``max_steps`` is reached."""
        state = self.run.state
        max_epochs = self.run.trainer.max_epochs
        max_steps = self.run.trainer.max_steps
        if max_epochs is not None and max_epochs != -1 and state.epoch >= max_epochs:
            return True
        return max_steps != -1 and state.global_step >= max_steps

    def is_limited_by_steps_only(self) -> bool:
        """Whether nothing but ``max_steps`` ends the training."""
        trainer = self.run.trainer
        has_other_limit = trainer.max_epochs not in (None, -1) or trainer.max_time
        return trainer.max_steps != -1 and not has_other_limit

    def may_stop(self, num_epochs: int | None = None) -> bool:
        """Whether somebody asked to stop, and the minimum has been trained.

        Args:
            num_epochs: complete epochs (default: those before the running one).
        """
        trainer = self.run.trainer
        state = self.run.state
        if not self.run.consensus.stop:
            return False
        if num_epochs is None:
            num_epochs = state.epoch
        if num_epochs < (trainer.min_epochs or 0):
            return False
        return state.global_step >= (trainer.min_steps or 0)

    def max_steps_is_reached(self) -> bool:
        """Whether the epoch has come to the last optimizer step of the training."""
        return self.run.state.global_step >= self._max_steps

    def was_stopped(self) -> bool:
        """Whether the run that is resumed was saved where it stopped, in the middle of the epoch."""
        state = self.run.state
        if state.batch_idx == 0 or state.batches_done:
            return False
        return self.max_steps_is_reached() or self.may_stop()

    # The alarm.

    def begin_epoch(self) -> None:
        """Read the limits that count in this epoch.

        Raises:
            ValueError: if ``val_check_interval`` does not go with the number of batches.
        """
        trainer = self.run.trainer
        state = self.run.state
        self.length = self.run.loaders.max_batches["train"]
        self._max_steps = INFINITE if trainer.max_steps == -1 else trainer.max_steps
        self._validate_every, offset = self._validation_interval()
        since_validation = (state.batch_idx + offset) % self._validate_every
        self._last_validation = state.batch_idx - since_validation
        self._next_validation = self._last_validation + self._validate_every
        self._steps_before = state.global_step if state.batch_idx == 0 else None
        if self._by_progress is not None:
            self._by_progress.begin_epoch()

    def validation_was_due(self) -> bool:
        """Whether the run that is resumed was saved right before a validation."""
        if self._by_progress is not None:
            return self._by_progress.was_due()
        return 0 < self.run.state.batch_idx == self._last_validation

    def validation_is_due(self) -> bool:
        """Whether to validate after the batch that has just ended, by the interval."""
        if self._by_progress is not None:
            return self._by_progress.is_due()
        return self.run.state.batch_idx == self._next_validation

    def plan(self) -> None:
        """Set the alarm anew, once everything has been done that was due."""
        state = self.run.state
        consensus = self.run.consensus
        if state.batch_idx >= self._next_validation:
            self._next_validation += self._validate_every
        # The batch with the last step of the training, at the earliest: a batch takes one optimizer step at most.
        last_step = state.batch_idx + self._max_steps - state.global_step
        self.due = min(self.length, self._next_validation, consensus.due, last_step)
        if self._by_progress is not None:
            self.due = min(self.due, state.batch_idx + self._by_progress.num_batches)
        # Only now, as a signal may come between any two lines. A request that waits for an open window, or for the
        # minimum to be trained, is looked at after each batch.
        if consensus.stop:
            self.due = 0

    def wake(self) -> None:
        """Let the loop look after the next batch whether something is due."""
        self.due = 0

    def end_after(self, num_batches: int) -> None:
        """Let the epoch end after ``num_batches``, with which its data has turned out to end."""
        self.length = num_batches
        self.due = min(self.due, num_batches)

    def took_no_step(self) -> bool:
        """Whether the epoch, which began in this run, has had no optimizer step."""
        return self.run.state.global_step == self._steps_before

    # Validation.

    def validates_in_epoch(self) -> bool:
        """Whether the running epoch is one with validation."""
        every = self.run.trainer.check_val_every_n_epoch
        if not self.run.trainer.enable_validation:
            return False
        return every is None or (self.run.state.epoch + 1) % every == 0

    def validates_at_end(self) -> bool:
        """Whether to validate at the end of an epoch whose length was not known beforehand.

        ``val_check_interval`` is then a fraction of an estimated length. Its last validation comes at the real end of
        the epoch, unless one has come less than half an interval before.
        """
        state = self.run.state
        interval = self.run.trainer.val_check_interval
        if self._by_progress is not None or not isinstance(interval, float):
            return False
        if state.batch_idx >= self.run.loaders.max_batches["train"]:
            return False
        every, _ = self._validation_interval()
        return state.validated < 0 or state.batch_idx % every * 2 > every

    def validation_follows(self) -> bool:
        """Whether validation comes right after the training batch that has just ended."""
        state = self.run.state
        if self._by_progress is not None:
            return self._by_progress.is_due() and self.validates_in_epoch()
        every, offset = self._validation_interval()
        is_due = (state.batch_idx + offset) % every == 0
        is_due = is_due or (state.batches_done and self.validates_at_end())
        return is_due and self.validates_in_epoch()

    def note_validation(self) -> None:
        """A validation of the fit has ended: the interval begins anew."""
        if self._by_progress is not None:
            self._by_progress.begin_anew()

    def validation_mark(self) -> ValidationMark | None:
        """Where the interval stands, for a run that resumes this one."""
        if self._by_progress is None:
            return None
        return self._by_progress.state()

    def missed_validation(self) -> bool:
        """Whether the epoch ended before ``val_check_interval`` batches, so that it had no validation."""
        trainer = self.run.trainer
        interval = trainer.val_check_interval
        if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
            return False
        return self.run.state.batch_idx < interval and self.validates_in_epoch()

    def _validation_interval(self) -> tuple[int | float, int]:
        """The interval in batches, and an offset: validation comes where ``(batch_idx + offset) % interval == 0``."""
        trainer = self.run.trainer
        loaders = self.run.loaders
        interval = trainer.val_check_interval
        if not trainer.enable_validation or self._by_progress is not None:
            return INFINITE, 0
        if isinstance(interval, int):
            if trainer.check_val_every_n_epoch is None:
                return interval, self.run.state.past_batches
            # What is left of an epoch that other ranks began may be shorter: it has no validation, and is no mistake.
            if interval > loaders.whole_epoch:
                raise ValueError(
                    f"val_check_interval={interval} is more than the {loaders.whole_epoch} training batches of an "
                    "epoch; for an interval over epochs, set check_val_every_n_epoch=None"
                )
            return interval, 0
        num_batches = loaders.max_batches["train"]
        if num_batches == INFINITE:
            if interval == 1.0:
                return INFINITE, 0
            num_batches = trainer.num_training_batches
        if num_batches == INFINITE:
            raise ValueError(
                f"val_check_interval={interval}: the training loader has no length to take a fraction of; pass a "
                "number of batches"
            )
        return max(1, int(num_batches * interval)), 0
