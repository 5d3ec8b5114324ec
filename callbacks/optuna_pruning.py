"""End trials of Optuna that do not look promising."""

from __future__ import annotations

import secrets
import threading
from functools import cache
from multiprocessing.managers import BaseManager, BaseProxy
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from .base import Callback
from .monitor import acts_at_epoch_ends, not_logged

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class OptunaPruningCallback(Callback):
    """Reports a logged value to a trial of Optuna, and raises ``optuna.TrialPruned`` if the trial is to be pruned.

    It reports at the end of each epoch, or after each validation where that runs more or less often. The step that it
    reports is the epoch, or, with several validations in an epoch, the number of validations before.

    With several processes, the main one reports, and all raise after the same validation. In a notebook, the trial
    stays where it is: the processes that are started for a run reach it over a local socket, whatever its storage. In a
    script, each process has a study of its own. So that all have the same trials, give the sampler a seed, and leave
    the storage out in all but the main process; if they have other ones, that is an error.

    Args:
        trial: the trial.
        monitor: name of a logged value.

    Raises:
        ValueError: in a run, if the processes have different trials.
        RuntimeError: if nothing of that name was logged.
    """

    phase = "decide"

    def __init__(self, trial: Any, monitor: str) -> None:
        self.monitor = monitor
        # In scripts of optuna-integration, a trial that all processes share by itself.
        self._trial = getattr(trial, "_delegate", trial)
        self._num_reports = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        trial = self._trial
        own = None
        if trial is not None and not isinstance(trial, BaseProxy):
            own = (trial.number, trial.params)
        by_rank = trainer.strategy.gather_objects(own)  # collective
        if len({repr(each) for each in by_rank if each is not None}) > 1:
            raise ValueError(
                f"OptunaPruningCallback: the processes have different trials (number and parameters, by rank: {by_rank}"
                "). Each has a study of its own here: give its sampler a seed, such as "
                "optuna.samplers.TPESampler(seed=0), and a storage in the main process only"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.epoch_done and acts_at_epoch_ends(trainer, None):
            self._report(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        in_epoch = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_epoch and not acts_at_epoch_ends(trainer, None):
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        logged = trainer.callback_metrics
        value = logged.get(self.monitor)
        # All processes go on with the main process's value.
        value = trainer.strategy.broadcast(
            None if value is None else float(value)
        )  # collective
        if value is None:
            raise not_logged(self, self.monitor, logged)
        # As an int, 1 means after every batch.
        once_an_epoch = str(trainer.val_check_interval) == "1.0"
        step = trainer.current_epoch if once_an_epoch else self._num_reports
        self._num_reports += 1
        prunes = False
        if trainer.is_global_zero:
            self._trial.report(value, step)
            prunes = self._trial.should_prune()
        elif type(getattr(self._trial, "storage", None)).__name__ == "InMemoryStorage":
            # The study of this process proposes what the main one's does, as long as it knows the same.
            self._trial.report(value, step)
        if trainer.strategy.broadcast(prunes):  # collective
            from optuna import TrialPruned

            raise TrialPruned(
                f"pruned at epoch {trainer.current_epoch}, step {trainer.global_step}: {self.monitor} = {value:.6g}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_reports": self._num_reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_reports = state_dict["num_reports"]

    # The trial itself does not go to other processes, nor does its stand-in come back from them.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        trial = state.pop("_trial")
        if trial is not None and not isinstance(trial, BaseProxy):
            _TRIALS[id(trial)] = trial
            state["_remote"] = (id(trial), _address(), _KEY)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        number, *server = state["_remote"]
        manager = _Trials(*server)
        manager.connect()
        self._trial = manager.trial(number)


class _Trials(BaseManager):
    """Gives other processes, or copies, access to the trials of the process that has started them."""

    if TYPE_CHECKING:

        def trial(self, number: int) -> Any: ...


# By their ids, those that others reach.
_TRIALS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_KEY = secrets.token_bytes(32)
_Trials.register("trial", _TRIALS.__getitem__, exposed=["report", "should_prune"])


@cache
def _address() -> Any:
    """Where the trials of this process are reached: a thread answers there."""
    server = _Trials(("127.0.0.1", 0), _KEY).get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.address
