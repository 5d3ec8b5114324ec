"""What a fit says in the log about itself, once: where and how it trains, and what a user may not have meant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...strategies.launch.slurm import slurm_job
from ..data.iteration import INFINITE
from ..data.shard_detection import data_parallel_rank_and_size
from ..messages import log
from .eval_mode import names_in_eval_mode

if TYPE_CHECKING:
    from .run import Run


def announce_start(run: Run) -> None:
    """Say where and how the run trains."""
    trainer = run.trainer
    engine = run.engine
    if trainer.barebones or not trainer.is_global_zero:
        return
    facts = f"strategy {engine.strategy.name}, {_counted(trainer.world_size, 'process', 'es')}"
    if engine.environment is not None:
        facts += f" launched by {engine.environment.launcher}"
    line = f"Training on {engine.device} ({facts}) in {engine.precision.name}"
    if trainer.accumulate_grad_batches > 1:
        line += f", {trainer.accumulate_grad_batches} batches per step"
    log.info("%s", line)
    _announce_idle_tasks(trainer.world_size)


def _announce_idle_tasks(world_size: int) -> None:
    """Say that a batch script of SLURM's has not started its tasks."""
    job = slurm_job()
    if job is None or job.interactive or job.in_step or job.num_tasks <= world_size:
        return
    log.warning(
        "SLURM job %s has %d tasks, and %s here: srun python … starts a process for each task",
        job.name,
        job.num_tasks,
        _counted(world_size, "process", "es"),
    )


def announce_batches(run: Run) -> None:
    """Say how many samples an optimizer step takes, where that is more than a batch; the strategy checks it before."""
    trainer = run.trainer
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    if not isinstance(batch_size, int):
        batch_size = None
    accumulate = trainer.accumulate_grad_batches
    run.engine.strategy.check_steps(
        batch_size,
        accumulate,
        trainer.gradient_clip_val,
        trainer.gradient_clip_algorithm,
    )
    if trainer.barebones or not trainer.is_global_zero or batch_size is None:
        return
    _, num_shards = data_parallel_rank_and_size(run.engine.strategy)
    factors = ""
    if num_shards > 1:
        factors += f" × {num_shards} processes"
    if accumulate > 1:
        factors += f" × {accumulate} batches"
    if factors:
        total = batch_size * num_shards * accumulate
        log.info("Effective batch size: %d samples%s = %d", batch_size, factors, total)


def announce_surprises(run: Run) -> None:
    """Say what a user may not have meant: parts in evaluation mode, no validation, epochs without step values."""
    trainer = run.trainer
    if names := names_in_eval_mode(run.module, run.in_eval_mode):
        run.warn_once(
            "In evaluation mode when training begins, so without dropout and with fixed batch norms: %s. If that "
            "is not meant, call train() on it, such as in on_fit_start",
            ", ".join(names),
        )
    every = trainer.check_val_every_n_epoch
    max_epochs = trainer.max_epochs
    num_epochs = INFINITE if max_epochs in (None, -1) else max_epochs
    if every and every > num_epochs and trainer.num_val_batches:
        run.warn_once(
            "Nothing is validated: check_val_every_n_epoch=%d, and max_epochs=%d",
            every,
            max_epochs,
        )
    # Infinite where the user wants no step values at all.
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    if trainer.loggers and steps <= trainer.log_every_n_steps - 1 < INFINITE:
        log.info(
            "An epoch has %d optimizer steps, fewer than log_every_n_steps=%d: not each epoch writes step values",
            math.ceil(steps),
            trainer.log_every_n_steps,
        )


def announce_nothing_to_train(run: Run) -> None:
    """Say why a fit has nothing to train."""
    trainer = run.trainer
    state = run.state
    if not run.loaders.max_batches["train"]:
        run.warn_once(
            "Nothing is trained: limit_train_batches=%s", trainer.limit_train_batches
        )
        return
    if not state.global_step:
        return
    max_epochs = trainer.max_epochs
    name = "max_steps"
    limit = trainer.max_steps
    if max_epochs is not None and max_epochs != -1 and state.epoch >= max_epochs:
        name = "max_epochs"
        limit = max_epochs
    run.warn_once(
        "There is nothing to train: %s=%d was reached before (epoch %d, step %d). To go on, set trainer.%s to more",
        name,
        limit,
        state.epoch,
        state.global_step,
        name,
    )


def _counted(count: int, noun: str, plural: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{plural}"
