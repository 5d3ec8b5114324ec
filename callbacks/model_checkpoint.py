"""Save checkpoints when they are due, and keep the best ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from .arguments import require_choice, require_int
from .base import Callback
from .checkpoint_names import absolute, default_dirpath, fill
from .checkpoint_record import CheckpointRecord
from .monitor import not_logged, worst_value
from .save_schedule import SaveSchedule

if TYPE_CHECKING:
    from ..framework import Module, Trainer
    from ..framework.checkpoint.saver import Save

log = getLogger("loopwright")

T = TypeVar("T")


class _Recorded(Generic[T]):
    """An attribute of a ModelCheckpoint that is kept in its record, and so in its checkpoints."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: ModelCheckpoint | None, owner: type) -> T:
        if callback is None:
            return self  # type: ignore[return-value] # the attribute of the class itself
        return getattr(callback._record, self._name)

    def __set__(self, callback: ModelCheckpoint, value: T) -> None:
        callback._note(**{self._name: value})


class ModelCheckpoint(Callback):
    """Save checkpoints during training, and keep the best or the newest of them.

    A checkpoint is a directory or a file, ``epoch=3-step=400.ckpt`` by default, that is either complete or does not
    count. It is written while the training goes on: a save holds the loop up for a copy of the state to the host's
    memory, and for the save before if that is still under way. When training has ended, all are complete.

    ``last.ckpt`` (with ``save_last``) and ``best.ckpt`` (with ``monitor``) are pointers: small files that name a
    checkpoint, or links to a local file that is one, replaced atomically. They can be loaded like what they point to.
    A checkpoint is removed only after the next one and the pointers are in place, and never while a pointer names it
    or a fit that was resumed from it is running.

    Nothing is saved in the sanity check and under ``fast_dev_run``, nor twice at one ``global_step``. What is due
    inside an accumulation window is saved at its end.

    A signal that asks the training to end (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) makes the first ``ModelCheckpoint`` save
    at once, whatever is due.

    Args:
        dirpath: where to save, a path or an fsspec URL. By default ``checkpoints`` in the first logger's folder, or
            in the Trainer's ``default_root_dir`` if there is no logger. If another run is saving in that local
            folder, this one saves in a folder ``v1`` (``v2``, …) inside it, and says so.
        filename: name without extension; ``{name:format}`` stands for ``epoch``, ``step`` or any logged value.
            By default ``{epoch}-{step}``. A name without fields is overwritten or, if it must be kept, numbered.
        monitor: name of the logged value by which checkpoints are ranked; None keeps the newest. A NaN counts as the
            worst of all values. If a checkpoint is due before the value was logged, and a validation is still to
            come, the checkpoint is saved after the validation.
        verbose: tell what is saved and what is not.
        save_last: keep a pointer to the newest checkpoint. Each checkpoint that is due is then saved, even if it is
            not among the best, and so is the end of the training. ``"link"`` means the same.
        save_top_k: how many to keep; -1 keeps all, 0 none. Without ``monitor``: 1, -1 or 0.
        save_weights_only: leave out everything that is only needed to resume.
        mode: ``"min"`` if less is better, ``"max"`` if more is.
        auto_insert_metric_name: write ``name=value`` for each field of ``filename``. Switch it off if a name has a
            slash in it, which would make a folder.
        every_n_train_steps: save when ``global_step`` is a multiple of this; 0 or None switches it off.
        train_time_interval: save when this much time has passed since the last time.
        every_n_epochs: save after every n-th epoch; 0 switches it off. By default 1 if neither of the other two is
            given. It does not keep ``save_last`` from saving each epoch.
        save_on_train_epoch_end: save at the end of an epoch (True) or of a validation (False). By default at the
            end of an epoch if validation runs once in every epoch or never, and else after validation.
        enable_version_counter: put ``-v1``, ``-v2``, … behind a name that is taken; otherwise overwrite.
        async_save: write while the training goes on. False waits until the checkpoint is complete; a subclass that
            does something with it after ``_save_checkpoint`` may need that.
        on_save_error: ``"raise"`` ends the training when a checkpoint could not be written: at the next save, or at
            the end. ``"warn"`` says so and goes on; what was saved before is kept, and the next one is tried.
        save_format: ``"folder"``, or ``"file"``: one file that ``torch.load`` opens. By default the Trainer's.
        every: instead of ``every_n_train_steps``, ``train_time_interval`` and ``every_n_epochs``, one interval as
            text: ``"500 steps"``, ``"10 minutes"``, ``"2 epochs"`` or ``"1M tokens"``, which are the weights that
            ``training_step`` returns, of all processes.

    Attributes:
        best_model_path: the best checkpoint (without ``monitor``: the newest), or "".
        best_model_score: its value, a tensor without dimensions on the CPU, or None.
        last_model_path: the pointer ``last.ckpt``, or "".
        current_score: the value of the checkpoint that was ranked last.
        best_k_models: values of the checkpoints kept for their rank, by path.
        kth_best_model_path: the worst of them, once there are ``save_top_k``.
        kth_value: its value.

    Raises:
        ValueError: if an argument is not as above, or two of the three triggers are given.
        RuntimeError: when a checkpoint is due, if nothing called ``monitor`` was ever logged.
        OSError: when a fit begins, if ``dirpath`` cannot be written to; later, if a checkpoint could not be written,
            naming it. What was saved before is untouched.
    """

    phase = "persist"

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    CHECKPOINT_NAME_BEST = "best"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    best_model_path = _Recorded[str]()
    best_model_score = _Recorded["Tensor | None"]()
    last_model_path = _Recorded[str]()
    current_score = _Recorded["Tensor | None"]()
    best_k_models = _Recorded[dict[str, Tensor]]()
    kth_best_model_path = _Recorded[str]()
    kth_value = _Recorded[Tensor]()

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        async_save: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise",
        save_format: Literal["folder", "file"] | None = None,
        every: str | None = None,
    ) -> None:
        require_choice(
            "mode",
            mode,
            "min",
            "max",
        )
        require_choice(
            "on_save_error",
            on_save_error,
            "raise",
            "warn",
        )
        require_choice(
            "save_format",
            save_format,
            None,
            "folder",
            "file",
        )
        require_choice(
            "save_last",
            save_last,
            None,
            True,
            False,
            "link",
        )
        require_int(
            "save_top_k",
            save_top_k,
            -1,
            "an int of at least 0, or -1 for all",
        )
        if monitor is None and save_top_k > 1:
            raise ValueError(
                f"save_top_k={save_top_k} needs a monitor to rank by; without one it is 1, -1 or 0"
            )
        self.dirpath = None if dirpath is None else absolute(os.fspath(dirpath))
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.async_save = async_save
        self.on_save_error = on_save_error
        self.save_format = save_format
        self._schedule = SaveSchedule(
            every_n_train_steps,
            train_time_interval,
            every_n_epochs,
            save_on_train_epoch_end,
            every,
        )
        self._enable_version_counter = enable_version_counter
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget all checkpoints."""
        self._record = CheckpointRecord(kth_value=worst_value(self.mode))
        # What counts again if the save that is under way fails.
        self._record_before = self._record
        self._save: Save | None = None
        # What the main process does when the checkpoint that is being written is complete.
        self._on_complete: Callable[[], None] | None = None
        # Checkpoints that it has removed since the last save was finished.
        self._removed: list[str] = []
        # Whether the last checkpoint could not be written.
        self._to_try_again = False
        # Whether a checkpoint became due inside an accumulation window, whose end it waits for.
        self._waits_for_window = False

    def _note(self, **changes: Any) -> None:
        """Change fields of the record."""
        self._record = replace(self._record, **changes)

    @property
    def state_key(self) -> str:
        schedule = self._schedule
        interval = schedule.train_time_interval
        tokens = ""
        if schedule.every_n_tokens:
            tokens = f", every_n_tokens={schedule.every_n_tokens:g}"
        return (
            f"{type(self).__qualname__}[monitor={self.monitor!r}, mode={self.mode!r}, "
            f"every_n_train_steps={schedule.every_n_train_steps!r}, "
            f"every_n_epochs={schedule.every_n_epochs!r}, "
            f"train_time_interval={interval and str(interval)!r}{tokens}]"
        )

    @property
    def every_n_train_steps(self) -> int:
        """After how many optimizer steps a checkpoint is due; 0: steps make none due."""
        return self._schedule.every_n_train_steps

    @property
    def every_n_epochs(self) -> int:
        """After how many epochs a checkpoint is due; 0: epochs make none due."""
        return self._schedule.every_n_epochs

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing under way.
        return {**self.__dict__, "_save": None, "_on_complete": None}

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "dirpath": self.dirpath,
            "monitor": self.monitor,
            "interval_elapsed": self._schedule.elapsed_seconds,
            **self._record.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; if ``dirpath`` is another one now, of the checkpoints only ``best_model_path``."""
        same_folder = state_dict["dirpath"] == self.dirpath
        self._record = self._record.restored(state_dict, same_folder)
        self._schedule.resume(state_dict.get("interval_elapsed", 0.0))
        if not same_folder:
            warnings.warn(
                f"The dirpath has changed from {state_dict['dirpath']!r} to {self.dirpath!r}: of the ModelCheckpoint's "
                "state only best_model_path is taken over; the list of the best checkpoints begins anew.",
                stacklevel=2,
            )

    # -- when to save -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        # A collective: another process could find another version number free, or have a folder named by the time.
        self.dirpath = trainer.strategy.broadcast(
            self.dirpath or default_dirpath(trainer)
        )
        if stage != "fit" or trainer.fast_dev_run:
            return
        try:
            self.dirpath = trainer.checkpoints.claim_folder(self.dirpath)
        except OSError:
            if self.on_save_error == "raise":
                raise

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        # A run that goes back to a checkpoint begins again at a window's end.
        self._waits_for_window = False
        # This is another run than that of the record, such as one of another module.
        if trainer.global_step < self._record.last_global_step_saved:
            self._begin_anew()
        epochs = trainer.max_epochs
        is_limited = epochs not in (None, -1)
        if is_limited and self.every_n_epochs > epochs and not self.save_last:
            log.warning(
                "ModelCheckpoint(every_n_epochs=%d) saves nothing: max_epochs=%d",
                self.every_n_epochs,
                epochs,
            )
        self._schedule.start(
            trainer.global_step, trainer.consensus.clock, trainer.state.tokens
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._waits_for_window and not trainer.window_is_open:
            self._save_due(trainer)
        if self._schedule.is_within_epochs:
            self._save_for_step(trainer)

    def _save_for_step(self, trainer: Trainer) -> None:
        """Save what is due after an optimizer step, if there was one."""
        if not self._schedule.is_due_after_step(trainer.global_step):
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self.monitor is not None and trainer.validation_follows():
            # The value logged until now is that of the validation before.
            self._note(postponed=True)
        else:
            self._save_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._schedule.note_validation()
        self._save_for_epoch(trainer, not self._schedule.saves_at_epoch_ends(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        # The epoch may have been left inside an accumulation window, which has then ended.
        self._save_for_step(trainer)
        self._save_for_epoch(trainer, self._schedule.saves_at_epoch_ends(trainer))

    def _save_for_epoch(self, trainer: Trainer, is_moment: bool) -> None:
        """Save what was postponed; or, if this is the moment for it, what is due once in an epoch."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        is_due = self._schedule.is_due_after_epoch(trainer.current_epoch)
        if self._record.postponed or (is_moment and is_due):
            self._save_due(trainer)
        elif is_moment and self.save_last and not self._schedule.is_within_epochs:
            self._save_unranked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._finish_save()
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_at_end(trainer)
        self._finish_save()

    def _save_at_end(self, trainer: Trainer) -> None:
        if self._to_try_again:
            self._save_due(trainer)
        elif self._record.postponed:
            # No validation came to say how good it is. It is kept all the same, as the worst.
            log.warning(
                "ModelCheckpoint(monitor=%r): training ended without a validation",
                self.monitor,
            )
            values = self._monitor_candidates(trainer)
            score = values.get(str(self.monitor), worst_value(self.mode))
            self._save_scored(trainer, values, score)
        elif self.save_last:
            self._save_unranked(trainer)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: Module,
        exception: BaseException,
    ) -> None:
        # After an exception, a process hears of its own saves only.
        error = _error_of(self._finish_save)
        if error is not None:
            log.error("%s", error)

    def save_now(self, trainer: Trainer) -> str:
        """Save where the run is, whatever is due, to resume from. A collective.

        Returns:
            The path; "" if nothing could be saved and ``on_save_error`` is ``"warn"``.

        Raises:
            OSError: if this checkpoint or the one before could not be written, and ``on_save_error`` is ``"raise"``.
        """
        # What the save before has raised must wait: this one is the last that is tried.
        earlier = _error_of(self._finish_save)
        if not self._is_saved(trainer) or self.save_weights_only:
            usual = self.save_weights_only
            self.save_weights_only = False
            try:
                self._save_unranked(trainer)
            finally:
                self.save_weights_only = usual
        self._finish_save()
        if earlier is not None:
            raise earlier
        if not self._is_saved(trainer):
            return ""
        return self._record.last_checkpoint_saved

    def _is_saved(self, trainer: Trainer) -> bool:
        return trainer.global_step == self._record.last_global_step_saved

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return (
            self._is_saved(trainer)
            or bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
        )

    # -- what to save -----------------------------------------------------------------------------------------

    def _save_due(self, trainer: Trainer) -> None:
        """Save a checkpoint if it is among the best, or ``save_last`` asks for it."""
        self._note(postponed=False)
        self._waits_for_window = trainer.window_is_open
        if self._waits_for_window:
            # Only at the window's end a checkpoint knows all that the run needs to go on exactly.
            return
        # The save before counts among the best only if it could be written.
        self._finish_save()
        values = self._monitor_candidates(trainer)
        if self.monitor is None:
            if self.save_top_k != 0 or self.save_last:
                self._commit(trainer, values, ranked=self.save_top_k != 0)
        elif self.monitor in values:
            self._save_scored(trainer, values, values[self.monitor])
        elif self._schedule.awaits_validation(trainer):
            self._note(postponed=True)
        else:
            raise not_logged(self, self.monitor, trainer.callback_metrics)

    def _save_scored(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        score: Any,
    ) -> None:
        """Save a checkpoint with this value of ``monitor`` if it is among the best, or ``save_last`` asks for it."""
        # "step" and "epoch" are numbers.
        score = torch.as_tensor(score)
        ranked = self.check_monitor_top_k(trainer, score)
        if not ranked and self.verbose and trainer.is_global_zero:
            log.info(
                "%s: %s = %.6g is not among the best %d.",
                _moment(trainer),
                self.monitor,
                score,
                self.save_top_k,
            )
        if ranked or self.save_last:
            self._commit(
                trainer,
                values,
                score,
                ranked,
            )

    def _save_unranked(self, trainer: Trainer) -> None:
        """Save a checkpoint that does not count among the best."""
        self._commit(trainer, self._monitor_candidates(trainer), ranked=False)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Any]:
        """What was logged, and ``epoch`` and ``step``, as the main process has it."""
        values: dict[str, Any] = {
            name: value.detach().to("cpu", copy=True)
            for name, value in trainer.callback_metrics.items()
        }
        epoch = trainer.current_epoch
        if epoch > 0 and trainer.batch_idx == 0:
            # After the last epoch, `current_epoch` counts the completed ones.
            epoch -= 1
        # Logged by the user, they are tensors of floats, which file names do not want.
        values["epoch"] = int(values.get("epoch", epoch))
        values["step"] = int(values.get("step", trainer.global_step))
        return trainer.strategy.broadcast(values)  # collective

    def check_monitor_top_k(
        self,
        trainer: Trainer,
        current: Tensor | None = None,
    ) -> bool:
        """Whether a checkpoint is among the best ``save_top_k``.

        Args:
            trainer: whose run it is.
            current: its value of ``monitor``, a tensor without dimensions; None is not among them.
        """
        if current is None or self.save_top_k == 0:
            return False
        return self._record.ranks(current, self.mode, self.save_top_k)

    def _commit(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        score: Tensor | None = None,
        ranked: bool = True,
    ) -> None:
        """Save one checkpoint, then set the pointers, and only then remove what is needed no longer.

        The record changes first, so that the checkpoint holds what is true once it is complete; if saving fails, the
        record from before counts again.
        """
        self._finish_save()
        self._record_before = self._record
        self._to_try_again = False
        failed = _error_of(
            partial(
                self._begin_save,
                trainer,
                values,
                score,
                ranked,
            )
        )
        saves_itself = (
            type(self)._save_checkpoint is not ModelCheckpoint._save_checkpoint
        )
        path = self._record.last_checkpoint_saved
        if saves_itself:
            failed = trainer.checkpoints.agree(path, failed)
        written = failed is None
        if saves_itself and written:
            if self._on_complete is not None and trainer.is_global_zero:
                failed = _error_of(self._on_complete)
            failed = trainer.checkpoints.agree(path, failed)
        if failed is not None:
            self._fail(failed, written)
        if not self.async_save:
            self._finish_save()

    def _begin_save(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        score: Tensor | None,
        ranked: bool,
    ) -> None:
        """Put the next checkpoint and the pointers into the record, and save it."""
        before = self._record
        replaced = ""
        if ranked:
            replaced = self._replaced_by_the_next()
        path = self._free_path(trainer, values, self.filename, replaced)
        if ranked and score is not None:
            self._record = before.with_ranked(path, score, self.mode, self.save_top_k)
        elif ranked:
            self._note(best_model_path=path)
        removable = before.removable
        if path not in removable and (self.save_top_k != -1 or not ranked):
            removable = [*removable, path]
        self._note(
            last_checkpoint_saved=path,
            last_global_step_saved=trainer.global_step,
            removable=removable,
        )
        if self.save_last:
            name = self.CHECKPOINT_NAME_LAST
            reuse = before.last_model_path
            last = self._free_path(trainer, values, name, reuse, taken=path)
            self._note(last_model_path=last)
        if self.monitor is not None and self.best_model_path:
            self._note(best_pointer=self._best_pointer(trainer, values))
        value = ""
        if score is not None:
            value = f" ({self.monitor} = {score:.6g})"
        best = self.best_model_path or "none"
        report = f"{_moment(trainer)}: saved {path}{value}; the best is {best}."
        self._on_complete = partial(
            self._follow_up, trainer, before, self._record, report
        )
        self._save_checkpoint(trainer, path)

    def _replaced_by_the_next(self) -> str:
        """The checkpoint that the next one among the best will replace, or ""."""
        record = self._record
        replaced = ""
        if self.monitor is None and self.save_top_k == 1:
            replaced = record.best_model_path
        elif self.monitor and len(record.best_k_models) == self.save_top_k:
            replaced = record.kth_best_model_path
        # Not one of another program's, from which this run was resumed.
        return replaced if replaced in record.removable else ""

    def _best_pointer(self, trainer: Trainer, values: dict[str, Any]) -> str:
        """The path of the pointer to the best checkpoint; "" if a checkpoint has that name."""
        record = self._record
        name = self.CHECKPOINT_NAME_BEST
        checkpoints = [
            record.last_checkpoint_saved,
            *record.best_k_models,
            *record.removable,
        ]
        if self.format_checkpoint_name(values, name) in checkpoints:
            return ""
        return self._free_path(
            trainer,
            values,
            name,
            record.best_pointer,
        )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        on_complete = self._on_complete
        self._on_complete = None
        self._save = trainer.checkpoints.save(
            filepath,
            self.save_weights_only,
            wait=not self.async_save,
            on_complete=on_complete,
            save_format=self.save_format,
        )

    def _finish_save(self) -> None:
        """Wait for the save that is under way, if there is one. A collective."""
        if self._save is None:
            return
        save = self._save
        self._save = None
        failed = _error_of(save.finish)
        if failed is not None:
            self._fail(failed, save.written)
        removed = self._removed
        self._removed = []
        self._note(
            removable=[path for path in self._record.removable if path not in removed]
        )

    def _fail(self, error: BaseException, written: bool) -> None:
        """Raise or report that a checkpoint was not written, or, if it was, that something failed after it."""
        if not written:
            self._record = self._record_before
            self._to_try_again = True
        if self.on_save_error == "raise" or not isinstance(error, OSError):
            raise error
        log.warning("%s; training goes on all the same (on_save_error='warn')", error)

    # -- when a checkpoint is complete --------------------------------------------------------------------------

    def _follow_up(
        self,
        trainer: Trainer,
        before: CheckpointRecord,
        record: CheckpointRecord,
        report: str,
    ) -> None:
        """Set the pointers, tell the loggers, and remove what is needed no longer. The writing thread calls it."""
        for pointer, target, previous in (
            (
                record.last_model_path,
                record.last_checkpoint_saved,
                before.last_model_path,
            ),
            (record.best_pointer, record.best_model_path, before.best_pointer),
        ):
            if pointer:
                trainer.checkpoints.point(pointer, target)
            # The pointer may have another name now, as names may hold the epoch.
            if previous not in ("", pointer):
                trainer.checkpoints.remove(previous, self.dirpath)
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)
        if self.verbose:
            log.info("%s", report)
        resumed_from = ""
        if trainer.ckpt_path:
            resumed_from = absolute(str(trainer.ckpt_path))
        for path in record.unneeded(resumed_from):
            try:
                self._remove_checkpoint(trainer, path)
            except RuntimeError as error:
                # It is no checkpoint, such as what a subclass saved in a way of its own.
                log.warning("%r is due to be removed, and left alone: %s", path, error)
            except Exception as error:
                message = "%r could not be removed, which is tried again later: %s"
                log.warning(message, path, error)
                continue
            self._removed.append(path)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.checkpoints.remove(filepath, self.dirpath)

    # -- names ------------------------------------------------------------------------------------------------

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """The path of a checkpoint.

        Args:
            metrics: numbers by name, ``epoch`` and ``step`` among them; 0 stands for those that are missing.
            filename: a template to use instead of the callback's own.
            ver: number to put behind the name, as in ``-v1``.
            prefix: text to put before the name.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        equals = self.CHECKPOINT_EQUALS_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        name = fill(
            template,
            metrics,
            with_names=self.auto_insert_metric_name,
            equals=equals,
        )
        version = "" if ver is None else f"v{ver}"
        name = join.join(filter(None, (prefix, name, version))) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether the main process sees a checkpoint or a pointer of this name. A collective.

        Args:
            filepath: the checkpoint or pointer.
            trainer: whose processes ask.

        Raises:
            OSError: if it cannot tell; in all processes.
        """
        exists = False
        failure = ""
        if trainer.is_global_zero:
            try:
                exists = trainer.checkpoints.exists(os.fspath(filepath))
            except Exception as error:
                # Each file system has errors of its own.
                failure = f"{filepath!r} could not be looked up: {type(error).__name__}: {error}"
        exists, failure = trainer.strategy.broadcast((exists, failure))  # collective
        if failure:
            raise OSError(failure)
        return exists

    def _free_path(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        template: str | None,
        reuse: str,
        taken: str = "",
    ) -> str:
        """A path for a new checkpoint or pointer, with a version number if the name is taken. A collective.

        Args:
            trainer: whose processes agree on what exists.
            values: for the fields of the template.
            template: of the name; None takes the callback's own.
            reuse: a path that may be overwritten, or "".
            taken: a path that may not be, whether it exists yet or not.
        """
        version = self.STARTING_VERSION
        path = self.format_checkpoint_name(values, template)
        while path == taken or (
            self._enable_version_counter
            and path != reuse
            and self.file_exists(path, trainer)
        ):
            path = self.format_checkpoint_name(values, template, ver=version)
            version += 1
        return path


def _error_of(action: Callable[[], Any]) -> Exception | None:
    """What an action raises."""
    try:
        action()
    except Exception as error:
        return error
    return None


def _moment(trainer: Trainer) -> str:
    return f"Epoch {trainer.current_epoch}, step {trainer.global_step}"
