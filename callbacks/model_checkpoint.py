"""Save checkpoints when they are due, and keep the best ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from datetime import timedelta
from logging import getLogger
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .arguments import require, require_int, require_mode
from .base import Callback
from .checkpoint_paths import absolute, default_dirpath, fill
from .interval import Interval
from .monitor import acts_at_epoch_ends, not_logged

if TYPE_CHECKING:
    from ..framework import Module, Trainer
    from ..framework.checkpoint.saver import Save

log = getLogger("loopwright")

# Attributes that a checkpoint holds: those that always count, and those that only do in the same folder.
_RUN_STATE = ("best_model_path", "_last_global_step_saved", "_postponed")
_FOLDER_STATE = (
    "best_model_score", "current_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path",
    "_last_checkpoint_saved", "_best_pointer", "_removable",
)  # fmt: skip


class ModelCheckpoint(Callback):
    """Save checkpoints during training, and keep the best or the newest of them.

    A checkpoint is a directory, ``epoch=3-step=400.ckpt`` by default, that is either complete or does not count. It is
    written while the training goes on: a save holds the loop up for a copy of the state to the host's memory, and for
    the save before if that is still under way. When training has ended, all are complete.

    ``last.ckpt`` (with ``save_last``) and ``best.ckpt`` (with ``monitor``) are pointers: small files that name a
    checkpoint, replaced atomically. They can be loaded like what they point to. A checkpoint is removed only after
    the next one and the pointers are in place, and never while a pointer or the running fit (as what it was resumed
    from) needs it.

    Nothing is saved in the sanity check and under ``fast_dev_run``, nor twice at one ``global_step``. What is due
    inside an accumulation window is saved at its end.

    A signal that asks the training to end (SIGTERM, SIGUSR1, Ctrl-C) makes the first ``ModelCheckpoint`` save at once,
    whatever is due.

    Args:
        dirpath: where to save, a path or an fsspec URL. By default ``checkpoints`` in the first logger's folder, or
            in the Trainer's ``default_root_dir`` if there is no logger. If another run that lives saves in a local
            folder, this one does so in a folder ``v1`` (``v2``, …) inside of it, and says so.
        filename: name without extension; ``{name:format}`` stands for ``epoch``, ``step`` or any logged value.
            By default ``{epoch}-{step}``. A name without fields is overwritten or, if it must be kept, numbered.
        monitor: name of the logged value by which checkpoints are ranked; None keeps the newest. A NaN counts as the
            worst of all values. If it is not there yet when a checkpoint is due, but a validation is still to
            come, that checkpoint is saved after the validation.
        verbose: print what is saved and what is not.
        save_last: keep a pointer to the newest checkpoint; then one is saved each time that one is due, among the
            best or not, and at the end of the training. ``"link"`` means the same.
        save_top_k: how many to keep; -1 keeps all, 0 none. Without ``monitor``: 1, -1 or 0.
        save_weights_only: leave out what only resuming needs.
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
    ) -> None:
        require_mode(mode)
        require(
            on_save_error in ("raise", "warn"),
            "on_save_error",
            "'raise' or 'warn'",
            on_save_error,
        )
        require(
            save_last in (None, True, False, "link"),
            "save_last",
            "True, False, None or 'link'",
            save_last,
        )
        require_int("save_top_k", save_top_k, -1, "an int of at least 0, or -1 for all")
        if monitor is None and save_top_k > 1:
            raise ValueError(
                f"save_top_k={save_top_k} needs a monitor to rank by; without one it is 1, -1 or 0"
            )
        for name, value in (
            ("every_n_train_steps", every_n_train_steps),
            ("every_n_epochs", every_n_epochs),
        ):
            if value is not None:
                require_int(name, value, 0, "an int of at least 0, or None")
        interval = train_time_interval
        valid = interval is None or (
            isinstance(interval, timedelta) and interval >= timedelta(0)
        )
        require(
            valid,
            "train_time_interval",
            "a datetime.timedelta of 0 or more",
            interval,
        )
        if (
            sum([bool(every_n_train_steps), interval is not None, bool(every_n_epochs)])
            > 1
        ):
            raise ValueError(
                "give one of every_n_train_steps, train_time_interval and every_n_epochs (for several, use several "
                f"ModelCheckpoints); got {every_n_train_steps!r}, {train_time_interval!r} and {every_n_epochs!r}"
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
        self._train_time_interval = train_time_interval
        self._interval = None if interval is None else Interval(interval)
        self._every_n_train_steps = every_n_train_steps or 0
        # With no trigger given, each epoch is one; `every_n_epochs=0` says no.
        none_given = (
            every_n_train_steps is None
            and train_time_interval is None
            and every_n_epochs is None
        )
        self._every_n_epochs = 1 if none_given else every_n_epochs or 0
        self._within_epochs = (
            bool(self._every_n_train_steps) or train_time_interval is not None
        )
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Know of no checkpoint."""
        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.kth_best_model_path = ""
        self.kth_value = self._worst_value()
        self.last_model_path = ""
        self._last_global_step_saved = (
            0  # there is nothing to save before the first step
        )
        self._last_checkpoint_saved = ""  # what `last` points to
        self._best_pointer = ""
        self._removable: list[
            str
        ] = []  # checkpoints of ours that go as soon as nothing needs them
        self._postponed = (
            False  # one was due, but `monitor` comes with the next validation
        )
        self._validated = False
        self._last_step_seen = 0
        self._waits_for_window = False  # one was due inside an accumulation window
        self._on_complete: Callable[[], None] | None = (
            None  # to be done when the checkpoint that is begun is complete
        )
        self._save: Save | None = None  # the checkpoint that is being written
        self._to_try_again = False  # the last one could not be written
        self._removed: list[str] = []  # checkpoints that went when it was complete
        self._before: dict[str, Any] = {}  # the attributes before it

    @property
    def state_key(self) -> str:
        settings = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval
            and str(self._train_time_interval),
        }
        return f"{type(self).__qualname__}[{', '.join(f'{name}={value!r}' for name, value in settings.items())}]"

    @property
    def every_n_epochs(self) -> int:
        """After how many epochs a checkpoint is due; 0: not by epochs."""
        return self._every_n_epochs

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_save": None,
            "_on_complete": None,
        }  # a copy has nothing under way

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "dirpath": self.dirpath,
            "monitor": self.monitor,
            "interval_elapsed": self._interval.elapsed
            if self._interval
            else None,  # seconds
            **{
                name.removeprefix("_"): copy(getattr(self, name))
                for name in (*_RUN_STATE, *_FOLDER_STATE)
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; if ``dirpath`` is another one now, only ``best_model_path``."""
        same_folder = state_dict["dirpath"] == self.dirpath
        for name in (*_RUN_STATE, *(_FOLDER_STATE if same_folder else ())):
            setattr(self, name, copy(state_dict[name.removeprefix("_")]))
        if self._interval:
            self._interval.elapsed = state_dict["interval_elapsed"]
        if not same_folder:
            warnings.warn(
                f"ModelCheckpoint's dirpath was {state_dict['dirpath']!r} and is now {self.dirpath!r}: of its state "
                "only best_model_path is taken over; the list of the best checkpoints begins anew.",
                stacklevel=2,
            )

    # -- when to save -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
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

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        if (
            trainer.global_step < self._last_global_step_saved
        ):  # another run, such as of another module
            self._begin_anew()
        self._last_step_seen = trainer.global_step
        epochs = trainer.max_epochs
        if (
            epochs not in (None, -1)
            and self._every_n_epochs > epochs
            and not self.save_last
        ):
            log.warning(
                "ModelCheckpoint(every_n_epochs=%d) saves nothing: max_epochs=%d",
                self._every_n_epochs,
                epochs,
            )
        if self._interval:
            self._interval.start(trainer.consensus.clock)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._waits_for_window and not trainer.window_is_open:
            self._save_due(trainer)
        self._save_for_step(trainer)

    def _save_for_step(self, trainer: Trainer) -> None:
        """Save what is due after an optimizer step, if there was one."""
        if not self._within_epochs:
            return
        step = trainer.global_step
        if step == self._last_step_seen:  # inside an accumulation window
            return
        self._last_step_seen = step
        due = (
            self._interval.is_over()
            if self._interval
            else step % self._every_n_train_steps == 0
        )
        if due and not self._should_skip_saving_checkpoint(trainer):
            if self.monitor is not None and trainer.validation_follows():
                self._postponed = (
                    True  # the value logged until now is that of the validation before
                )
            else:
                self._save_due(trainer)

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = True
        self._save_for_epoch(trainer, not self._should_save_on_train_epoch_end(trainer))

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self._save_for_step(
            trainer
        )  # the epoch may have been left inside a window, which has then ended
        self._save_for_epoch(trainer, self._should_save_on_train_epoch_end(trainer))

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        self._finish_save()
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_at_end(trainer)
        self._finish_save()

    def on_exception(
        self,
        trainer: Trainer,
        module: Module,
        exception: BaseException,
    ) -> None:
        try:
            self._finish_save()  # here, a process hears of its own saves only
        except Exception as error:
            log.error("%s", error)

    def save_now(self, trainer: Trainer) -> str:
        """Save where the run is, whatever is due, to resume from; returns the path, or "". A collective."""
        earlier: Exception | None = None
        try:
            self._finish_save()
        except (
            Exception
        ) as error:  # of the save before; this one is the last that is tried
            earlier = error
        if (
            trainer.global_step != self._last_global_step_saved
            or self.save_weights_only
        ):
            usual, self.save_weights_only = self.save_weights_only, False
            try:
                self._commit(
                    trainer,
                    self._monitor_candidates(trainer),
                    ranked=False,
                    asked=True,
                )
            finally:
                self.save_weights_only = usual
        self._finish_save()
        if earlier is not None:
            raise earlier
        return (
            self._last_checkpoint_saved
            if trainer.global_step == self._last_global_step_saved
            else ""
        )

    def _save_at_end(self, trainer: Trainer) -> None:
        if self._to_try_again:
            self._save_due(trainer)
        elif self._postponed:
            # No validation came to say how good it is. It is kept all the same, as the worst.
            log.warning(
                "ModelCheckpoint(monitor=%r): training ended without a validation",
                self.monitor,
            )
            candidates = self._monitor_candidates(trainer)
            score = candidates.get(str(self.monitor), self._worst_value())
            self._commit(
                trainer,
                candidates,
                score,
                ranked=self.check_monitor_top_k(trainer, score),
            )
        elif self.save_last:
            self._commit(trainer, self._monitor_candidates(trainer), ranked=False)

    def _save_for_epoch(self, trainer: Trainer, is_moment: bool) -> None:
        """Save what was postponed; or, if this is the moment for it, what is due once in an epoch."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        epoch_is_due = (
            self._every_n_epochs
            and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        )
        if self._postponed or (is_moment and epoch_is_due):
            self._save_due(trainer)
        elif is_moment and self.save_last and not self._within_epochs:
            self._commit(trainer, self._monitor_candidates(trainer), ranked=False)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return (
            trainer.global_step == self._last_global_step_saved
            or bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
        )

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        return acts_at_epoch_ends(trainer, self._save_on_train_epoch_end)

    # -- what to save -----------------------------------------------------------------------------------------

    def _save_due(self, trainer: Trainer) -> None:
        """Save a checkpoint if it is among the best, or ``save_last`` asks for it."""
        self._postponed = False
        self._waits_for_window = trainer.window_is_open
        if self._waits_for_window:
            return  # only at its end a checkpoint knows all that the run needs to go on exactly
        self._finish_save()  # the one before counts among the best only if it could be written
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None:
            self._commit(trainer, candidates, ranked=self.save_top_k != 0)
            return
        score = candidates.get(self.monitor)
        if score is None:
            if not trainer.enable_validation or self._validated:
                raise not_logged(self, self.monitor, trainer.callback_metrics)
            self._postponed = True
            return
        score = torch.as_tensor(score)  # "step" and "epoch" are numbers
        ranked = self.check_monitor_top_k(trainer, score)
        if not ranked and self.verbose and trainer.is_global_zero:
            log.info(
                "%s: %s = %.6g is not among the best %d.",
                _moment(trainer),
                self.monitor,
                score,
                self.save_top_k,
            )
        self._commit(trainer, candidates, score, ranked)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Any]:
        """What was logged, and ``epoch`` and ``step``, as the main process has it."""
        values: dict[str, Any] = {
            name: value.detach().to("cpu", copy=True)
            for name, value in trainer.callback_metrics.items()
        }
        # Logged by the user, they are tensors of floats, which file names do not want.
        # After the last epoch, `current_epoch` counts the completed ones.
        epoch = trainer.current_epoch - (
            trainer.batch_idx == 0 and trainer.current_epoch > 0
        )
        values["epoch"] = int(values.get("epoch", epoch))
        values["step"] = int(values.get("step", trainer.global_step))
        return trainer.strategy.broadcast(values)  # a collective

    def check_monitor_top_k(
        self,
        trainer: Trainer,
        current: Tensor | None = None,
    ) -> bool:
        """Whether a checkpoint with the value ``current`` is among the best ``save_top_k``."""
        if current is None or self.save_top_k == 0:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        current = self._nan_is_worst(current)
        return bool(
            current < self.kth_value if self.mode == "min" else current > self.kth_value
        )

    def _commit(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        score: Tensor | None = None,
        ranked: bool = True,
        asked: bool = False,
    ) -> None:
        """Save one checkpoint, then set the pointers, and only then remove what is needed no longer.

        The attributes are set before, so that the checkpoint knows of itself; if saving fails, they are put back.
        """
        self._finish_save()
        if not ranked and not self.save_last and not asked:
            return
        self._before = {
            name: copy(getattr(self, name)) for name in (*_RUN_STATE, *_FOLDER_STATE)
        }
        self._to_try_again = written = False
        failed: BaseException | None = None
        try:
            self._on_complete = self._prepare(trainer, values, score, ranked)
            self._save_checkpoint(trainer, self._last_checkpoint_saved)
            written = True
        except Exception as error:
            failed = error
        if (
            type(self)._save_checkpoint is not ModelCheckpoint._save_checkpoint
        ):  # it saves in a way of its own
            written, failed = self._follow_up(trainer, failed)
        if failed is not None:
            self._failed(failed, written)
        if not self.async_save:
            self._finish_save()

    def _prepare(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        score: Tensor | None,
        ranked: bool,
    ) -> Callable[[], None]:
        """Set the attributes as they are with the new checkpoint; returns what is to be done when it is complete."""
        old_last, old_best = self.last_model_path, self._best_pointer
        dropped = self._dropped_by_the_next() if ranked else ""
        path = self._free_path(trainer, values, self.filename, reuse=dropped)
        if ranked:
            self._enter(path, score, dropped)
        if path not in self._removable and (self.save_top_k != -1 or not ranked):
            self._removable.append(path)
        self._last_checkpoint_saved = path
        if self.save_last:
            name = self.CHECKPOINT_NAME_LAST
            self.last_model_path = self._free_path(
                trainer,
                values,
                name,
                reuse=old_last,
                taken=path,
            )
        if self.monitor is not None and self.best_model_path:
            name = self.CHECKPOINT_NAME_BEST
            if self.format_checkpoint_name(values, name) in {
                path,
                *self.best_k_models,
                *self._removable,
            }:
                self._best_pointer = ""  # the user's `filename` is "best"
            else:
                self._best_pointer = self._free_path(
                    trainer,
                    values,
                    name,
                    reuse=old_best,
                )
        self._last_global_step_saved = trainer.global_step
        moment, best = _moment(trainer), self.best_model_path
        pointers = (
            (self.last_model_path, path, old_last),
            (self._best_pointer, best, old_best),
        )
        unneeded = self._unneeded(trainer)

        def on_complete() -> None:
            for pointer, target, previous in pointers:
                if pointer:
                    trainer.checkpoints.point(pointer, target)
                if previous not in ("", pointer):  # its name may hold the epoch
                    trainer.checkpoints.remove(previous, self.dirpath)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
            if self.verbose:
                value = "" if score is None else f" ({self.monitor} = {score:.6g})"
                log.info(
                    "%s: saved %s%s; the best is %s.",
                    moment,
                    path,
                    value,
                    best or "none",
                )
            for old in unneeded:
                try:
                    self._remove_checkpoint(trainer, old)
                    self._removed.append(old)
                except RuntimeError as error:  # it is no checkpoint, such as what a subclass saved in a way of its own
                    log.warning(
                        "%r is due to be removed, and left alone: %s", old, error
                    )
                    self._removed.append(old)
                except Exception as error:
                    log.warning(
                        "%r could not be removed, which is tried again later: %s",
                        old,
                        error,
                    )

        return on_complete

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        on_complete, self._on_complete = self._on_complete, None
        self._save = trainer.checkpoints.save(
            filepath,
            self.save_weights_only,
            wait=not self.async_save,
            on_complete=on_complete,
        )

    def _follow_up(
        self,
        trainer: Trainer,
        failed: BaseException | None,
    ) -> tuple[bool, BaseException | None]:
        """Do what follows a save of a subclass's own, if all processes have done their part. A collective.

        Returns:
            Whether they have, and what went wrong in any of them.
        """
        path = self._last_checkpoint_saved
        if (failed := trainer.checkpoints.agree(path, failed)) is not None:
            return False, failed
        try:
            if self._on_complete is not None and trainer.is_global_zero:
                self._on_complete()
        except Exception as error:
            failed = error
        return True, trainer.checkpoints.agree(path, failed)

    def _finish_save(self) -> None:
        """Wait for the save that is under way, if there is one. A collective."""
        if self._save is None:
            return
        save, self._save = self._save, None
        try:
            save.finish()
        except Exception as error:
            self._failed(error, written=save.written)
        removed, self._removed = self._removed, []
        self._removable = [path for path in self._removable if path not in removed]

    def _failed(self, error: BaseException, written: bool = False) -> None:
        """A checkpoint could not be written, or, if it was, what follows: nothing that was there before has gone."""
        if not written:
            self.__dict__.update(self._before)
            self._to_try_again = True
        if self.on_save_error == "raise" or not isinstance(error, OSError):
            raise error
        log.warning("%s; training goes on all the same (on_save_error='warn')", error)

    # -- the best ones ----------------------------------------------------------------------------------------

    def _dropped_by_the_next(self) -> str:
        """The checkpoint that the next one among the best will replace, or ""."""
        if self.monitor is None:
            return self.best_model_path if self.save_top_k == 1 else ""
        return (
            self.kth_best_model_path
            if len(self.best_k_models) == self.save_top_k
            else ""
        )

    def _enter(self, path: str, score: Tensor | None, dropped: str) -> None:
        """Put a checkpoint among the best in the place of ``dropped``."""
        if self.monitor is None:
            self.best_model_path = path
            return
        assert score is not None
        self.best_k_models.pop(dropped, None)
        self.current_score = self.best_k_models[path] = self._nan_is_worst(score)
        ranks = sorted(
            self.best_k_models,
            key=lambda path: float(self.best_k_models[path]),
            reverse=self.mode == "max",
        )
        self.best_model_path, self.best_model_score = (
            ranks[0],
            self.best_k_models[ranks[0]],
        )
        if self.save_top_k in (-1, len(ranks)):
            self.kth_value = self.best_k_models[ranks[-1]]
            # Of equally bad ones the oldest goes first.
            self.kth_best_model_path = next(
                p for p in self.best_k_models if self.best_k_models[p] == self.kth_value
            )

    def _nan_is_worst(self, score: Tensor) -> Tensor:
        return self._worst_value() if torch.isnan(score) else score

    def _worst_value(self) -> Tensor:
        return torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def _unneeded(self, trainer: Trainer) -> list[str]:
        """The checkpoints of ours that nothing needs any longer."""
        needed = {
            *self.best_k_models,
            self.best_model_path,
            self._last_checkpoint_saved,
        }
        if trainer.ckpt_path:  # what this fit was resumed from; a later one removes it
            needed.add(absolute(str(trainer.ckpt_path)))
        return [path for path in self._removable if path not in needed]

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
        join, equals = self.CHECKPOINT_JOIN_CHAR, self.CHECKPOINT_EQUALS_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        name = fill(
            template,
            metrics,
            with_names=self.auto_insert_metric_name,
            equals=equals,
        )
        name = join.join(
            [
                *([prefix] if prefix else []),
                name,
                *([f"v{ver}"] if ver is not None else []),
            ]
        )
        name += self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether the main process sees a checkpoint or a pointer of this name. A collective.

        Raises:
            OSError: if it cannot tell; in all processes.
        """
        found, why = False, ""
        if trainer.is_global_zero:
            try:
                found = trainer.checkpoints.exists(os.fspath(filepath))
            except Exception as error:  # each file system has its own
                why = f"{filepath!r} could not be looked up: {type(error).__name__}: {error}"
        found, why = trainer.strategy.broadcast((found, why))
        if why:
            raise OSError(why)
        return found

    def _free_path(
        self,
        trainer: Trainer,
        values: dict[str, Any],
        template: str | None,
        reuse: str,
        taken: str = "",
    ) -> str:
        """A path for a new checkpoint or pointer: with a version number if the name is taken, but by ``reuse``."""
        path = self.format_checkpoint_name(values, template)
        version = self.STARTING_VERSION
        while path == taken or (
            self._enable_version_counter
            and path != reuse
            and self.file_exists(path, trainer)
        ):
            path = self.format_checkpoint_name(values, template, ver=version)
            version += 1
        return path


def _moment(trainer: Trainer) -> str:
    return f"Epoch {trainer.current_epoch}, step {trainer.global_step}"
