"""The training loop: epochs, their batches, and what is due after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import Enum, auto
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from ..data.device_input import CopiedAhead
from ..data.iteration import NO_BATCH, LookAhead
from ..metrics.metric_state import unchanged_metrics
from ..seed import isolated_rng
from .announce import announce_batches, announce_nothing_to_train, announce_surprises
from .evaluate import sanity_check, validate
from .rewind import Rewind

if TYPE_CHECKING:
    from .run import Run


class Outcome(Enum):
    """How an epoch's batches ended."""

    COMPLETE = auto()
    """All of them were trained on."""
    SKIPPED = auto()
    """A hook returned -1: the rest is left out, and the epoch counts."""
    INTERRUPTED = auto()
    """``max_steps`` or a request to stop: a run that resumes this one finishes the epoch."""


def fit(run: Run) -> None:
    """Train until a limit is reached or somebody asks to stop.

    ::

        on_train_start
        for epoch in epochs:
            on_train_epoch_start
            for batch_idx, batch in batches:
                on_train_batch_start                        # returning -1 ends the epoch
                training_step
                zero_grad, if the batch is a window's first
                backward
                on_before_optimizer_step, clip, step, step-wise schedulers, if it is a window's last
                on_train_batch_end
                log / validate / stop when due
            on_train_epoch_end
        on_train_end
    """
    sanity_check(run)
    _load_data(run)
    if not run.loaders.max_batches["train"] or run.schedule.is_over():
        run.resume.apply_rng_and_metrics()
        announce_nothing_to_train(run)
        return
    _begin_training(run)
    if run.trainer.validate_before_training and not run.state.total_batches:
        validate(run, is_scheduled=False)
    while not run.schedule.is_over():
        if run.consensus.signal:
            run.end_by_signal()
        if run.schedule.may_stop():
            break
        try:
            outcome = train_batches(run, run.record.timed(begin_epoch(run)))
            end_epoch(run, outcome)
        except Rewind as rewind:
            go_back(run, rewind)
            continue
        if outcome is Outcome.INTERRUPTED:
            break
        run.state.next_epoch()
        run.loaders.begin_epoch()
    _end_training(run)


def train_batches(run: Run, batches: Iterator[Any]) -> Outcome:
    """Train on the epoch's batches, which are on the device already; returns how they ended."""
    state = run.state
    schedule = run.schedule
    hooks = run.hooks
    loader = run.engine.accumulation.loader
    step = _step_of(run)
    if schedule.was_stopped():
        return Outcome.INTERRUPTED
    for batch in batches:
        batch_idx = state.batch_idx
        run.metrics.begin_batch(batch, is_dummy=loader.batch_weight == 0.0)
        if batch is None:
            outputs = run.step.leave_out(batch_idx)
        else:
            if hooks.on_train_batch_start and _skips_epoch(run, batch, batch_idx):
                return Outcome.SKIPPED
            outputs = step(batch, batch_idx)
        state.batch_idx = batch_idx + 1
        if state.batch_idx >= schedule.length:
            _end_batches(run)
        for hook in hooks.on_train_batch_end:
            hook(outputs, batch, batch_idx)
        if state.batch_idx >= schedule.due:
            outcome = do_what_is_due(run)
            if outcome is not None:
                return outcome
    return Outcome.COMPLETE


def _step_of(run: Run) -> Callable[[Any, int], Any]:
    """Return what trains on a batch: the step, which leaves torchmetrics as they were if the batch is a dummy."""
    train_on = run.step.train_on
    if run.engine.num_processes == 1:
        return train_on

    def train_keeping_metrics(batch: Any, batch_idx: int) -> Any:
        if not run.metrics.is_dummy:
            return train_on(batch, batch_idx)
        with unchanged_metrics(run.module):
            return train_on(batch, batch_idx)

    return train_keeping_metrics


def _skips_epoch(run: Run, batch: Any, batch_idx: int) -> bool:
    """Call ``on_train_batch_start``; returns whether to skip the rest of the epoch at once, as a hook returned -1.

    With several ranks that waits until they have agreed on it.
    """
    skips = False
    for hook in run.hooks.on_train_batch_start:
        skips |= hook(batch, batch_idx) == -1
    return skips and run.consensus.request_skip()


def do_what_is_due(run: Run) -> Outcome | None:
    """Validate, agree, or end the epoch's batches, by what is due after the batch that has just ended.

    Returns:
        How the batches ended; None to go on with them.
    """
    state = run.state
    schedule = run.schedule
    consensus = run.consensus
    if schedule.validation_is_due():
        validate(run)
        # They still wait if there was nothing to validate on.
        run.step.schedulers.step_on_waiting_values()
    if state.batch_idx >= consensus.due:
        consensus.agree(state.batch_idx)
    is_stopped = schedule.max_steps_is_reached()
    if not is_stopped and consensus.stop and not run.window_is_open:
        if consensus.signal:
            run.end_by_signal()
        is_stopped = schedule.may_stop(state.epoch + state.batches_done)
    if state.batches_done:
        return Outcome.COMPLETE
    if is_stopped:
        return Outcome.INTERRUPTED
    if consensus.skip:
        return Outcome.SKIPPED
    schedule.plan()
    return None


# The training's beginning and end.


def _load_data(run: Run, again: bool = False) -> None:
    """Make the training loader, and put it where the run begins."""
    run.loaders.load_train(again)
    if run.state.epoch_done:
        run.state.next_epoch()
        run.loaders.begin_epoch()
    run.resume.apply_position()


def _begin_training(run: Run) -> None:
    """Begin to note signals, call the first hooks, and put the loop's own work among those that follow."""
    announce_batches(run)
    if run.schedule.validates_in_epoch():
        run.loaders.load_validation()
    run.state.enter("train")
    run.begin_batches()
    run.signals.begin()
    run.metrics.enter("train", "epoch")
    run.step.schedule_free.train()
    run.hooks.call("on_train_start")
    announce_surprises(run)
    # What the loop itself does at these moments stands among the hooks; see the end of this file.
    if run.trainer.loggers or run.step.schedulers.each_step_on_value:
        run.hooks.insert("on_train_batch_end", partial(_after_batch, run))
    run.hooks.insert("on_train_epoch_end", partial(_after_epoch, run))
    run.hooks.insert("on_validation_end", partial(_after_validation, run))
    run.record.begin_training(run)
    run.consensus.agree(run.state.batch_idx)


def _end_training(run: Run) -> None:
    """Call the last hooks, and end by a signal that has come meanwhile."""
    run.metrics.enter("train", None)
    run.hooks.call("on_train_end")
    run.consensus.agree(run.state.batch_idx)
    if run.consensus.signal:
        run.end_by_signal()


def go_back(run: Run, rewind: Rewind) -> None:
    """Go back to a checkpoint of the run, as a fit that resumes from it begins, and leave batches out from there on."""
    # Of a validation that was left.
    run.restore_training_mode()
    run.metrics.forget()
    run.forget_unfinished()
    run.step.abandon()
    run.consensus.withdraw_stop()
    # The checkpoint may be older than what was left out before.
    left_out = run.state.left_out or []
    run.take_up(rewind.resume)
    rewind.resume.apply_counters()
    rewind.resume.apply_weights()
    rewind.resume.apply_optimizers()
    run.step.schedule_free.train()
    _load_data(run, again=True)
    run.state.leave_out(left_out)
    run.loaders.leave_out(rewind.batches)
    run.state.enter("train")
    run.metrics.enter("train", "epoch")
    run.hooks.call("on_train_start")


# An epoch's beginning and end.


def begin_epoch(run: Run) -> Iterator[Any]:
    """Begin an epoch, or go on with one; returns its batches, from the position on."""
    state = run.state
    loaders = run.loaders
    schedule = run.schedule
    if loaders.is_stale("train", run.trainer.reload_dataloaders_every_n_epochs):
        loaders.load_train(again=True)
    if state.batch_idx == 0:
        # For a run that resumes between epochs: before hooks, which may log or draw random numbers.
        run.resume.apply_rng_and_metrics()
        run.metrics.enter("train", "epoch")
        run.hooks.call("on_train_epoch_start")
    run.engine.start_epoch()
    batches = iter(()) if state.batches_done else loaders.iterate_train()
    loader = loaders.train
    assert loader is not None
    left_out = loaders.left_out()
    if not left_out:
        batches = loaders.copied_ahead(batches, loader.source.loader, loader)
    is_moved = isinstance(batches, CopiedAhead)
    if is_moved:
        loader = batches
    if loaders.looks_ahead:
        loader = LookAhead(batches, loader)
        batches = _ending_windows(run, loader)
    run.engine.accumulation.read_from(loader)
    # For a run that resumes inside an epoch: only now, as making the iterator draws random numbers, too.
    run.resume.apply_rng_and_metrics()
    run.metrics.enter("train", "batch")
    run.step.begin_epoch()
    schedule.begin_epoch()
    if schedule.validation_was_due():
        validate(run)
    run.consensus.begin_epoch(state.batch_idx, schedule.wake)
    schedule.plan()
    transfer = run.record.timed_transfer(loaders.transfer(is_moved))
    if left_out:
        return _leaving_out(run, batches, transfer, left_out)
    return batches if transfer is None else map(transfer, batches, repeat(0))


def _leaving_out(
    run: Run,
    batches: Iterator[Any],
    transfer: Callable[[Any, int], Any] | None,
    left_out: set[int],
) -> Iterator[Any]:
    """Give the same batches, and None for those that are left out; reading these draws nothing at random."""
    while True:
        is_left_out = run.state.batch_idx in left_out
        with isolated_rng() if is_left_out else nullcontext():
            batch = next(batches, NO_BATCH)
        if batch is NO_BATCH:
            return
        if is_left_out:
            batch = None
        elif transfer is not None:
            batch = transfer(batch, 0)
        yield batch


def _ending_windows(run: Run, batches: LookAhead) -> Iterator[Any]:
    """Give the same batches, and end the epoch, and so its window, with the last of them."""
    for batch in batches:
        num_batches = run.state.batch_idx + 1
        if num_batches < run.schedule.length and run.step.ends_inside_window(batches):
            run.schedule.end_after(num_batches)
        yield batch


def _end_batches(run: Run) -> None:
    """Step the schedulers that step by epochs, and note that the epoch's batches have all been trained on."""
    run.step.schedulers.step_after_batches()
    run.state.end_batches()


def end_epoch(run: Run, outcome: Outcome) -> None:
    """End an epoch, complete or not: close its window, validate if that is due, reduce and log its values."""
    state = run.state
    run.metrics.begin_batch(None)
    # What has been read ahead is let go of.
    run.engine.accumulation.read_from(run.loaders.train)
    if outcome is Outcome.INTERRUPTED:
        if run.consensus.stop:
            validate(run, is_scheduled=False)
    elif not state.batches_done:
        _end_early(run, outcome)
    if outcome is Outcome.COMPLETE:
        _check_that_steps_were_taken(run)
        if run.schedule.validates_at_end():
            validate(run)
        _note_missed_validation(run)
    # They still wait if no validation has come.
    run.step.schedulers.step_on_waiting_values()
    if not state.batches_done:
        run.keep_unfinished()
    run.metrics.enter("train", "epoch")
    run.metrics.reduce_epoch()
    run.hooks.call("on_train_epoch_end")
    run.consensus.agree(state.batch_idx)


def _end_early(run: Run, outcome: Outcome) -> None:
    """End the batches of an epoch before its length says so: its data has ended, or its rest was skipped."""
    state = run.state
    if state.batch_idx == 0 and outcome is Outcome.COMPLETE:
        message = f"the training loader gave no batch in epoch {state.epoch}"
        if state.epoch:
            message += "; an iterator can be read once only: pass an iterable that can be begun again"
        raise RuntimeError(message)
    if run.window_is_open:
        run.step.end_window_early(state.batch_idx - 1)
        if state.global_step % run.trainer.log_every_n_steps == 0:
            run.log_step()
        run.step.schedulers.wait_for_value()
    _end_batches(run)


def _check_that_steps_were_taken(run: Run) -> None:
    """Look whether an epoch had an optimizer step.

    Raises:
        RuntimeError: if it had none, in automatic optimization, or where only steps can end the fit.
    """
    state = run.state
    if not run.schedule.took_no_step() or run.step.leaves_out:
        return
    if run.module.automatic_optimization:
        raise RuntimeError(
            f"no optimizer step was taken in epoch {state.epoch}: training_step returned no loss for any of its "
            f"{state.batch_idx} batches. Return the loss from it, or set self.automatic_optimization = False if it "
            "steps by itself"
        )
    message = (
        "Manual optimization took no optimizer step in an epoch: call step() or update(loss) of self.optimizers() in "
        "training_step; steps of others are not counted"
    )
    if run.schedule.is_limited_by_steps_only():
        raise RuntimeError(
            f"{message}, so that max_steps={run.trainer.max_steps} is never reached"
        )
    run.warn_once(message)


def _note_missed_validation(run: Run) -> None:
    """Warn if the epoch had fewer batches than ``val_check_interval``."""
    if run.schedule.missed_validation():
        run.warn_once(
            "An epoch ended before val_check_interval=%d batches, so it had no validation: set a lower number or a "
            "fraction, or count over epochs with check_val_every_n_epoch=None",
            run.trainer.val_check_interval,
        )


# The loop's own work among the hooks: before the callbacks that decide by its results, or save them.


def _after_batch(run: Run, *_: Any) -> None:
    """With ``on_train_batch_end``: log the step's values, and let schedulers step on them."""
    if not run.step.stepped:
        return
    if run.state.global_step % run.trainer.log_every_n_steps == 0:
        run.log_step()
    if run.step.schedulers.each_step_on_value:
        # If a validation follows, they step on what it finds.
        run.state.wait_for_validation()
        if not run.schedule.validation_follows():
            run.step.schedulers.step_on_waiting_values()


def _after_validation(run: Run) -> None:
    """With ``on_validation_end``: the validation that is due at this batch is done."""
    if run.state.stage == "validate":
        run.state.mark_validated()
        run.schedule.note_validation()
        run.step.schedulers.step_on_waiting_values()


def _after_epoch(run: Run) -> None:
    """With ``on_train_epoch_end``: log the epoch's values, and let schedulers step on them."""
    last = run.metrics.step_results().logged
    values = run.metrics.end_epoch().logged
    run.trainer.log_row(values)
    run.record.end_epoch(run, {**last, **values})
    if run.state.batches_done:
        run.step.schedulers.step_on_epoch_values()
        run.state.end_epoch()
