"""Lightning's ModelCheckpoint: its arguments, names and files, on Loopwright's."""

from __future__ import annotations

import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from ....callbacks import Callback
from ....callbacks import ModelCheckpoint as NativeModelCheckpoint
from ....callbacks.checkpoint_names import fill
from ....callbacks.checkpoint_record import CheckpointRecord
from ....callbacks.save_schedule import SaveSchedule
from .files import yaml_of
from .progress import data_states, loop_states
from .utilities import (
    MisconfiguredValue,
    get_filesystem,
    misconfigured_values,
)

__all__ = ["Checkpoint", "ModelCheckpoint", "log"]

log = logging.getLogger("loopwright")


class _Schedule(SaveSchedule):
    """A schedule that equals one with the same attributes, as a ModelCheckpoint and its copy are compared by theirs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaveSchedule) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment] # its attributes change


class Checkpoint(Callback):
    """The base of callbacks that save checkpoints. A Trainer that is given one makes no ModelCheckpoint of its own."""

    phase = "persist"

    def save_now(self, trainer: Any) -> str:
        """Save where the run is, as a signal asks it to end.

        Args:
            trainer: whose run it is.

        Returns:
            The path; "" if nothing was saved, as by this class.
        """
        return ""


class ModelCheckpoint(NativeModelCheckpoint, Checkpoint):
    """A :class:`~loopwright.callbacks.ModelCheckpoint` that writes a checkpoint in one file, and no ``best.ckpt``.

    With ``save_top_k=0``, ``last.ckpt`` is the checkpoint itself.

    Args:
        *args: of :class:`~loopwright.callbacks.ModelCheckpoint`.
        save_on_exception: save a checkpoint when an exception ends the training.
        **kwargs: of :class:`~loopwright.callbacks.ModelCheckpoint`.

    Raises:
        MisconfigurationException: if arguments do not fit.
    """

    def __init__(
        self,
        dirpath: Any = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: Any = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_ranks(monitor, mode, save_top_k)
        _check_intervals(every_n_train_steps, every_n_epochs, train_time_interval)
        with misconfigured_values():
            super().__init__(
                dirpath or None,
                filename,
                monitor,
                verbose,
                save_last,
                save_top_k,
                save_weights_only,
                mode,
                auto_insert_metric_name,
                every_n_train_steps,
                train_time_interval,
                every_n_epochs,
                save_on_train_epoch_end,
                enable_version_counter,
                **kwargs,
            )
        self.save_on_exception = save_on_exception
        self._schedule = _Schedule(
            every_n_train_steps,
            train_time_interval,
            every_n_epochs,
            save_on_train_epoch_end,
            kwargs.get("every"),
        )

    @property
    def state_key(self) -> str:
        schedule = self._schedule
        return key_of(
            self,
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=schedule.every_n_train_steps,
            every_n_epochs=schedule.every_n_epochs,
            train_time_interval=schedule.train_time_interval,
        )

    @property
    def _every_n_train_steps(self) -> int:
        return self.every_n_train_steps

    @property
    def _last_checkpoint_saved(self) -> str:
        return self._record.last_checkpoint_saved

    @property
    def _last_global_step_saved(self) -> int:
        return self._record.last_global_step_saved

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.save_top_k != 0:
            _warn_of_files(self.dirpath)

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self.save_on_exception:
            self.save_now(trainer)

    def on_save_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if "callbacks" in checkpoint:
            checkpoint["loops"] = loop_states(trainer)
            checkpoint.update(data_states(trainer, checkpoint))

    def _best_pointer(self, trainer: Any, values: dict[str, Any]) -> str:
        # Programs count the files of a folder, or take all that end with .ckpt.
        return ""

    def _begin_save(
        self, trainer: Any, values: dict[str, Any], score: Any, ranked: bool
    ) -> None:
        if self.save_last and self.save_top_k == 0:
            self._begin_save_of_last(trainer, values)
        else:
            super()._begin_save(trainer, values, score, ranked)

    def _begin_save_of_last(self, trainer: Any, values: dict[str, Any]) -> None:
        """Save the only checkpoint that is kept, which needs no pointer."""
        before = self._record
        reuse = before.last_model_path
        path = self._free_path(trainer, values, self.CHECKPOINT_NAME_LAST, reuse)
        removable = before.removable
        if path not in removable:
            removable = [*removable, path]
        self._note(
            last_checkpoint_saved=path,
            last_global_step_saved=trainer.global_step,
            last_model_path=path,
            removable=removable,
        )
        without_pointers = replace(self._record, last_model_path="")
        self._on_complete = partial(
            self._follow_up,
            trainer,
            replace(before, last_model_path=""),
            without_pointers,
            f"saved {path}.",
        )
        self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        # A program may have put something in the place of the Trainer's method.
        if str(trainer.save_checkpoint.__module__).startswith("loopwright."):
            super()._save_checkpoint(trainer, filepath)
        else:
            trainer.save_checkpoint(filepath, self.save_weights_only)

    def _save_scored(self, trainer: Any, values: dict[str, Any], score: Any) -> None:
        verbose = self.verbose
        if not self.check_monitor_top_k(trainer, torch.as_tensor(score)):
            if verbose and trainer.is_global_zero:
                log.info(
                    "%s: %r was not in top %d",
                    f"Epoch {trainer.current_epoch}, global step {trainer.global_step}",
                    self.monitor,
                    self.save_top_k,
                )
            # It would be told twice.
            self.verbose = False
        try:
            super()._save_scored(trainer, values, score)
        finally:
            self.verbose = verbose

    def _follow_up(
        self,
        trainer: Any,
        before: CheckpointRecord,
        record: CheckpointRecord,
        report: str,
    ) -> None:
        super()._follow_up(trainer, before, record, self._reported(record, report))

    def _reported(self, record: CheckpointRecord, report: str) -> str:
        """What is told of a checkpoint: of one among the best, its value first."""
        path = record.last_checkpoint_saved
        moment = re.match(r"Epoch (\d+), step (\d+)", report)
        score = record.best_k_models.get(path)
        if moment is None or score is None:
            return report
        return (
            f"Epoch {moment[1]}, global step {moment[2]}: {self.monitor!r} reached {score:.5f} "
            f"(best {record.best_model_score:.5f}), saving model to {path!r} as top {self.save_top_k}"
        )

    @staticmethod
    def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        """Let a link point to a checkpoint, in place of what is there."""
        if trainer.is_global_zero:
            if os.path.islink(linkpath) or os.path.isfile(linkpath):
                os.remove(linkpath)
            elif os.path.isdir(linkpath):
                shutil.rmtree(linkpath)
            target = os.path.relpath(filepath, os.path.dirname(linkpath))
            os.symlink(target, linkpath)
        trainer.strategy.barrier()

    def _format_checkpoint_name(
        self,
        filename: str | None,
        metrics: Mapping[str, Any],
        prefix: str | None = None,
        auto_insert_metric_name: bool = True,
    ) -> str:
        join = self.CHECKPOINT_JOIN_CHAR
        name = fill(
            filename or f"{{epoch}}{join}{{step}}",
            metrics,
            with_names=auto_insert_metric_name,
            equals=self.CHECKPOINT_EQUALS_CHAR,
        )
        return name if prefix is None else f"{prefix}{join}{name}"

    def to_yaml(self, filepath: Any = None) -> None:
        """Write the paths of the best checkpoints, with their values.

        Args:
            filepath: the file. Default: ``best_k_models.yaml`` beside the checkpoints.
        """
        scores = {path: float(score) for path, score in self.best_k_models.items()}
        if filepath is None:
            filepath = os.path.join(self.dirpath or "", "best_k_models.yaml")
        with get_filesystem(filepath).open(str(filepath), "w") as file:
            file.write(yaml_of(scores))


def key_of(callback: Any, **arguments: Any) -> str:
    """The name of a callback's state in a checkpoint, as Lightning has it: the class, and some arguments."""
    return f"{type(callback).__qualname__}{arguments!r}"


def require_mode(mode: Any) -> None:
    """Refuse a mode that is neither ``"min"`` nor ``"max"``.

    Raises:
        MisconfigurationException: for another.
    """
    if mode not in ("min", "max"):
        raise MisconfiguredValue(f"`mode` can be 'min' or 'max', but got {mode}")


def _check_ranks(monitor: str | None, mode: Any, save_top_k: Any) -> None:
    require_mode(mode)
    if isinstance(save_top_k, int) and save_top_k < -1:
        raise MisconfiguredValue(
            f"Invalid value for save_top_k={save_top_k}. Must be >= -1"
        )
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfiguredValue(
            f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None) is not a valid configuration: there is nothing "
            "to rank by; without a monitor, save_top_k is 1, -1 or 0"
        )


def _check_intervals(steps: Any, epochs: Any, time: Any) -> None:
    for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if isinstance(value, int) and value < 0:
            raise MisconfiguredValue(f"Invalid value for {name}={value}. Must be >= 0")
    if bool(steps) + bool(epochs) + (time is not None) > 1:
        raise MisconfiguredValue(
            f"Combination of parameters every_n_train_steps={steps}, every_n_epochs={epochs} and "
            f"train_time_interval={time} should be mutually exclusive: for several, use several ModelCheckpoints"
        )


def _warn_of_files(folder: Any) -> None:
    system = get_filesystem(folder)
    if system.isdir(folder) and system.ls(folder):
        warnings.warn(
            f"Checkpoint directory {folder} exists and is not empty.", stacklevel=2
        )
