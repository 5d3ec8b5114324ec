"""The loops: plain functions, from an epoch down to the user's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.iteration import INFINITE, LookAhead
from ..metrics.metric_state import load_metric_states, metric_states
from ..seed import set_rng_state
from .evaluate import sanity_check, validate, waiting_plateau_step

if TYPE_CHECKING:
    from ..trainer import Trainer


def fit(trainer: Trainer) -> None:
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
    state, bus = trainer.state, trainer.bus
    sanity_check(trainer)
    trainer.data.load_train()
    if state.epoch_done:
        state.next_epoch()
        trainer.data.begin_epoch()
    if trainer.resumed is not None and trainer.data.train is not None:
        trainer.data.restore_loader(trainer.resumed)
    if not trainer.data.max_batches["train"] or _limit_reached(trainer):
        _restore_progress(trainer)
        if not trainer.data.max_batches["train"]:
            trainer.warn_once(
                "Nothing is trained: limit_train_batches=%s",
                trainer.limit_train_batches,
            )
        elif state.global_step:
            trainer.announce_end()
        return
    trainer.announce_batches()
    if trainer.validation_due_in_epoch():
        trainer.load_val_data()
    state.stage = "train"
    trainer.note_signals()
    trainer.metrics.enter("train", "epoch")
    for hook in bus.on_train_start:
        hook()
    trainer.announce_surprises()
    trainer.control.agree(state.batch_idx)
    while not _limit_reached(trainer):
        if trainer.control.signal:
            trainer.end_by_signal()
        if _may_stop(trainer):
            break
        if trainer.data.stale("train", trainer.reload_dataloaders_every_n_epochs):
            trainer.data.load_train(again=True)
        if not _train_epoch(trainer):
            break
        state.next_epoch()
        trainer.data.begin_epoch()
    trainer.metrics.enter("train", None)
    for hook in bus.on_train_end:
        hook()
    trainer.control.agree(state.batch_idx)
    if trainer.control.signal:
        trainer.end_by_signal()


def _limit_reached(trainer: Trainer) -> bool:
    state = trainer.state
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs not in (None, -1) and state.epoch >= epochs) or (
        steps != -1 and state.global_step >= steps
    )


def _may_stop(trainer: Trainer, epochs_done: int | None = None) -> bool:
    """Whether somebody asked to stop and the minimum has been trained."""
    if not trainer.control.stop:
        return False
    epochs_done = trainer.state.epoch if epochs_done is None else epochs_done
    return epochs_done >= (trainer.min_epochs or 0) and trainer.state.global_step >= (
        trainer.min_steps or 0
    )


def _restore_progress(trainer: Trainer) -> None:
    """Put random generators and metrics where the checkpoint left them."""
    resumed, trainer.resumed = trainer.resumed, None
    if resumed is None:
        return
    trainer.metrics.load_state_dict(resumed["metrics"])
    load_metric_states(trainer.module, resumed["metric_states"])
    if resumed["rng"] is not None:
        set_rng_state(resumed["rng"], trainer.engine.device)


def _train_epoch(trainer: Trainer) -> bool:
    """Train an epoch from the data cursor on; False if it was left before its end."""
    state, bus, metrics, optimization = (
        trainer.state,
        trainer.bus,
        trainer.metrics,
        trainer.optimization,
    )
    loader, num_batches, control = (
        trainer.data.train,
        trainer.data.max_batches["train"],
        trainer.control,
    )
    assert loader is not None
    ended = state.batches_done  # resumed from a checkpoint of the epoch's very end
    if state.batch_idx == 0:
        _restore_progress(trainer)
        metrics.enter("train", "epoch")
        for hook in bus.on_train_epoch_start:
            hook()
    trainer.engine.start_epoch()
    batches = iter(()) if ended else trainer.data.iterate_train()
    ahead = None
    if trainer.data.looks_ahead:
        batches = loader = ahead = LookAhead(batches, loader)
    trainer.engine.window.loader = loader
    _restore_progress(
        trainer
    )  # inside an epoch after its iterator was made, which draws random numbers too
    metrics.enter("train", "batch")
    optimization.begin_windows()

    step = (
        optimization.automatic_step
        if optimization.automatic
        else optimization.manual_step
    )
    transfer = trainer.data.transfer()
    on_start, on_end, on_end_late = (
        bus.on_train_batch_start,
        bus.on_train_batch_end,
        bus.on_train_batch_end_late,
    )
    log_every, plateau_each_step = (
        trainer.log_every_n_steps,
        optimization.plateau_each_step,
    )
    max_steps = trainer.max_steps if trainer.max_steps != -1 else INFINITE
    validate_every, validate_offset = trainer.validation_interval()
    skipped = stopped = False
    steps_before, begins = state.global_step, state.batch_idx == 0

    past = (
        state.batch_idx + validate_offset
    ) % validate_every  # batches since the last validation
    validate_next = state.batch_idx - past + validate_every
    if state.batch_idx and past == 0:
        validate(trainer)  # due when the checkpoint was saved, and not done
    stopped = (
        bool(state.batch_idx)
        and not ended
        and (state.global_step >= max_steps or _may_stop(trainer))
    )
    several = trainer.world_size > 1
    control.begin_epoch(state.batch_idx)

    for batch in batches if not stopped else ():
        batch_idx = state.batch_idx
        if (
            ahead is not None
            and batch_idx + 1 < num_batches
            and optimization.ends_inside_window(batch_idx, ahead)
        ):
            num_batches = batch_idx + 1
        if transfer is not None:
            batch = transfer(batch, 0)
        metrics.batch = batch
        if several:
            metrics.is_dummy = (
                loader.share == 0.0
            )  # neither the loss of such a batch nor what is logged about it counts
        for hook in on_start:
            if hook(batch, batch_idx) == -1:
                skipped = True
        if skipped:
            if not several:
                break
            control.wants_skip, skipped = True, False  # the others go on until all know

        kept = metric_states(trainer.module) if metrics.is_dummy else None
        outputs = step(batch, batch_idx, num_batches)
        if kept is not None:
            load_metric_states(trainer.module, kept)

        state.batch_idx = done = batch_idx + 1
        if done >= num_batches:
            _end_batches(trainer)
            ended = True
        for hook in on_end:
            hook(outputs, batch, batch_idx)
        stepped, global_step = optimization.stepped, state.global_step
        if stepped and global_step % log_every == 0:
            trainer.log_step()
        if (
            stepped and plateau_each_step
        ):  # on what a validation finds if one follows, and before what saves
            state.plateau_waits = True
            if not trainer.validation_follows():
                waiting_plateau_step(trainer)
        for hook in on_end_late:
            hook(outputs, batch, batch_idx)
        metrics.is_dummy = False
        if done == validate_next:
            validate(trainer)
            waiting_plateau_step(trainer)  # if there was nothing to validate on
            validate_next += validate_every
        if done >= control.due:
            control.agree(done)
        if stepped and global_step >= max_steps:
            stopped = True
        elif control.stop and not optimization.window_is_open:
            if control.signal:
                trainer.end_by_signal()
            stopped = _may_stop(trainer, state.epoch + ended)
        if ended or stopped:
            break
        if control.skip:
            skipped = True
            break

    metrics.batch = None
    del batches  # end its workers
    if not ended and not stopped:
        _end_early(trainer, skipped)
        ended = True
    if stopped and not ended:
        if control.stop and state.validated != state.batch_idx:
            validate(trainer, asked=False)
    elif not skipped:
        if (
            begins
            and state.global_step == steps_before
            and not optimization.has_zero_weights
        ):
            _note_no_step(trainer)
        if trainer.validation_due_at_end():
            validate(trainer)
        _note_no_validation(trainer)
    waiting_plateau_step(trainer)  # if no validation has come
    _end_epoch(trainer, complete=ended)
    control.agree(state.batch_idx)
    return ended


def _end_early(trainer: Trainer, skipped: bool) -> None:
    """The loader ended before its length said so, or it tells none, or a hook skipped the rest."""
    state, optimization = trainer.state, trainer.optimization
    if state.batch_idx == 0 and not skipped:
        again = (
            "; an iterator can be read once only: pass an iterable that can be begun again"
            if state.epoch
            else ""
        )
        raise RuntimeError(
            f"the training loader gave no batch in epoch {state.epoch}{again}"
        )
    if optimization.window_is_open:
        optimization.close_open_window(state.batch_idx - 1)
        if state.global_step % trainer.log_every_n_steps == 0:
            trainer.log_step()
        state.plateau_waits = bool(optimization.plateau_each_step)
    _end_batches(trainer)


def _note_no_step(trainer: Trainer) -> None:
    """An epoch's batches have all been trained on, and there was no optimizer step.

    Raises:
        RuntimeError: in automatic optimization.
    """
    epoch, batches = trainer.state.epoch, trainer.state.batch_idx
    if trainer.optimization.automatic:
        raise RuntimeError(
            f"no optimizer step was taken in epoch {epoch}: training_step returned no loss for any of its {batches} "
            "batches. Return the loss from it, or set self.automatic_optimization = False if it steps by itself"
        )
    trainer.warn_once(
        "Manual optimization took no optimizer step in an epoch: call step() or update(loss) of self.optimizers() in "
        "training_step; steps of others are not counted"
    )


def _note_no_validation(trainer: Trainer) -> None:
    every = trainer.val_check_interval
    by_epoch = isinstance(every, int) and trainer.check_val_every_n_epoch is not None
    if (
        by_epoch
        and trainer.state.batch_idx < every
        and trainer.validation_due_in_epoch()
    ):
        trainer.warn_once(
            "An epoch ended before val_check_interval=%d batches, so it had no validation: set a lower number or a "
            "fraction, or count over epochs with check_val_every_n_epoch=None", every,
        )  # fmt: skip


def _end_batches(trainer: Trainer) -> None:
    trainer.optimization.end_epoch()
    trainer.state.batches_done = True


def _end_epoch(trainer: Trainer, complete: bool) -> None:
    state, bus, metrics = trainer.state, trainer.bus, trainer.metrics
    if not complete:
        # The epoch goes on in another run, which needs the values gathered so far.
        trainer.unfinished = trainer.gathered()
    metrics.enter("train", "epoch")
    metrics.reduce_epoch()
    for hook in bus.on_train_epoch_end:
        hook()
    trainer.log_row(metrics.end_epoch().logged)
    metrics.moment = None
    if complete:
        trainer.optimization.plateau_each_epoch(lambda: trainer.callback_metrics)
        state.epoch_done = True  # all but what follows, which saves
    for hook in bus.on_train_epoch_end_late:
        hook()
