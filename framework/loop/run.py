"""A run: one call of ``fit``, ``validate``, ``test`` or ``predict``, and all that its loop works on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from torch import nn

from ..checkpoint.schema import loader_state
from ..messages import log
from ..metrics.metric_state import metric_states
from .hooks import CallbackBus
from .loaders import RunLoaders
from .resume import NoResume
from .rewind import RewindPoint
from .schedule import Schedule

if TYPE_CHECKING:
    from ..datamodule import DataModule
    from ..module import Module
    from ..trainer import Trainer
    from .step import Step


@dataclass
class RunRequest:
    """What was asked of a Trainer, its arguments checked.

    Attributes:
        fn: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        module: what runs.
        datamodule: its data, if they are in one.
        loaders: the loaders that were passed, by stage.
        ckpt_path: as passed.
        weights_only: as passed.
        keep: which predictions to return: ``"own"``, ``"all"`` or ``"none"``.
        search: what to call in the place of the loop, with the Trainer and the module.
        number: of a fit in its program, from 1.
    """

    fn: str
    module: Module
    datamodule: DataModule | None
    loaders: dict[str, Any]
    ckpt_path: Any = None
    weights_only: bool | None = None
    keep: str = "own"
    search: Callable[[Trainer, Module], Any] | None = None
    number: int = 0


@dataclass
class FitState:
    """What a fit leaves for the next one, which goes on from there.

    Attributes:
        module: what was trained.
        configured: what ``configure_optimizers`` asked for, before anything was trained or loaded.
        step: the optimizers and schedulers, while they live in this process and the strategy holds the module.
        optimization: their states, once they do not.
        unfinished: what was gathered of an epoch that was left before its end.
    """

    module: Module
    configured: str
    step: Step | None = None
    optimization: dict[str, Any] | None = None
    unfinished: dict[str, Any] | None = None

    def states(self) -> dict[str, Any]:
        """The states of optimizers and schedulers."""
        if self.step is not None:
            return self.step.state_dict()
        assert self.optimization is not None
        return self.optimization

    def detached(self, optimization: dict[str, Any] | None = None) -> FitState:
        """The same without what lives in this process; ``optimization`` are the states, if already taken."""
        states = self.states() if optimization is None else optimization
        return FitState(
            self.module, self.configured, None, states, unfinished=self.unfinished
        )


class SignalWatch(Protocol):
    """What notes the signals that ask a training to end."""

    in_a_hurry: bool

    def stand_by(self) -> None:
        """Begin a fit, which does not train yet."""

    def begin(self) -> None:
        """Note signals from now on."""

    def end(self) -> None:
        """Let signals do what they did before."""

    def send_again(self) -> None:
        """Send once more what was noted, and not acted upon."""

    def requeue(self, number: int, has_saved: bool) -> None:
        """Put the job back into its queue, where the signal ``number`` asks for that. A collective.

        Args:
            number: of the signal.
            has_saved: whether there is a checkpoint to go on from.
        """

    def wait_for_main(self) -> None:
        """Let the main rank be the first that ends, if the job is back in its queue."""


class Run:
    """One call of ``fit``, ``validate``, ``test`` or ``predict``, and all that its loop works on.

    Args:
        trainer: whose run it is.
        request: what was asked of it.
        signals: notes signals while the loop trains.
        name: of a fit, if its job may be started again; see :attr:`name`.

    Attributes:
        trainer: whose run it is; the loop reads its arguments.
        fn: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        module: what runs.
        datamodule: its data, if they are in one.
        engine: computes the steps.
        state: the counters that a checkpoint keeps.
        metrics: what is logged.
        consensus: what this rank asks for, and what all ranks have agreed on.
        hooks: what to call at each moment.
        loaders: where the batches come from.
        signals: notes signals while the loop trains.
        schedule: when what is due.
        step: trains on a batch. It is set in ``fit`` only, when the optimizers have been made.
        ckpt_path: the checkpoint that was read, if one was asked for.
        weights_only: whether pickled objects of checkpoints are left out, as passed.
        resume: what the run takes up from a checkpoint, or from the fit before.
        in_eval_mode: parts of the module that were in evaluation mode before any hook of the fit.
        checkpoints: those that the fit can go back to, by path.
        first_batch: which of the training's batches this fit has begun with, of ``state.total_batches``.
        name: what the same fit is called in each attempt at its job, and no other one; empty if nobody starts it again.
        record: is told of what happens.
    """

    step: Step

    def __init__(
        self,
        trainer: Trainer,
        request: RunRequest,
        signals: SignalWatch,
        name: str = "",
    ) -> None:
        self.trainer = trainer
        self.fn = request.fn
        self.module = request.module
        self.datamodule = request.datamodule
        self.engine = trainer.engine
        self.state = trainer.state
        self.metrics = trainer.metrics
        self.consensus = trainer.consensus
        self.signals = signals
        self.record = trainer.record
        heard = self.record.heard(trainer.callbacks)
        self.hooks = CallbackBus(trainer, request.module, heard)
        self.loaders = RunLoaders(
            trainer, request.module, request.datamodule, request.loaders
        )
        self.schedule = Schedule(self)
        self.ckpt_path: str | None = None
        self.weights_only = request.weights_only
        self.resume = NoResume()
        self.in_eval_mode: set[nn.Module] = set()
        self.checkpoints: dict[str, RewindPoint] = {}
        self.first_batch = -1
        self.compile_step: dict[str, Any] | None = None
        self.name = name
        self._warned: set[str] = set()
        self._training_modes: dict[nn.Module, bool] = {}

    def begin_fit(self, step: Step) -> None:
        """Train with these optimizers, which the next fit goes on with."""
        self.step = step
        self.trainer.last_fit = FitState(self.module, step.configured, step)

    def compile_steps(self, options: dict[str, Any] | None) -> None:
        """Make one graph of each training step, with these arguments of ``torch.compile``; None makes none."""
        self.compile_step = options

    def begin_batches(self) -> None:
        """Note that training begins, with the batch that comes next."""
        self.first_batch = self.state.total_batches

    def keep_unfinished(self) -> None:
        """Keep what the running epoch has gathered, for the run that goes on with it."""
        fit = self.trainer.last_fit
        assert fit is not None
        fit.unfinished = self.gathered()

    def forget_unfinished(self) -> None:
        """Forget what an epoch has gathered that the run does not go on with."""
        fit = self.trainer.last_fit
        assert fit is not None
        fit.unfinished = None

    def resume_from(self, path: str) -> None:
        """Note which checkpoint was read."""
        self.ckpt_path = path

    def note_checkpoint(self, path: str, is_own: bool) -> None:
        """Note that the fit, as it stands now, can be gone back to; ``is_own`` says whether it has saved ``path``."""
        counters = self.progress()
        position = (counters["epoch"], counters["batch_idx"])
        if counters["epoch_done"]:
            position = (counters["epoch"] + 1, 0)
        self.checkpoints[path] = RewindPoint(position, is_own)

    def take_up(self, resume: NoResume) -> None:
        """Go on from this, whose parts are applied at their moments."""
        self.resume = resume

    # What the loop says and logs.

    def warn_once(self, message: str, *args: Any) -> None:
        """Say on the main rank what a user may not have meant; once in this run.

        Args:
            message: the line, as of ``logging``.
            *args: its arguments.
        """
        if message not in self._warned and self.trainer.is_global_zero:
            log.warning(message, *args)
        self._warned.add(message)

    def log_step(self) -> None:
        """Write the running step's values to the loggers."""
        if self.trainer.loggers:
            self.record.begin_row(self)
            self.trainer.log_row(self.metrics.step_results().logged)
            self.record.end_row(self)

    # The module's training mode, which an evaluation changes.

    def note_eval_mode(self) -> None:
        """Note which parts of the module are in evaluation mode before any hook of the fit."""
        self.in_eval_mode = {m for m in self.module.modules() if not m.training}

    def remember_training_mode(self) -> None:
        """Note for each submodule whether it is in training mode."""
        self._training_modes = {
            module: module.training for module in self.module.modules()
        }

    def restore_training_mode(self) -> None:
        """Put each submodule back into the mode that was noted."""
        for module, training in self._training_modes.items():
            module.training = training
        self._training_modes = {}

    # How far the run has come.

    @property
    def live_step(self) -> Step | None:
        """The optimizers of this fit, or of the last one, if they live in this process."""
        fit = self.trainer.last_fit
        return None if fit is None else fit.step

    @property
    def window_is_open(self) -> bool:
        """Whether gradients of micro-batches wait for those that complete their accumulation window."""
        step = self.live_step
        return step is not None and step.window_is_open

    def progress(self) -> dict[str, Any]:
        """The counters as a checkpoint keeps them; in an open accumulation window, those of its start.

        Its gradients are not saved, so a run that resumes reads the window's batches again.
        """
        counters = self.state.state_dict()
        counters["validation"] = self.schedule.validation_mark()
        step = self.live_step
        if step is not None and step.window_is_open:
            counters["batch_idx"] = step.accumulation.start
            counters["validated"] = min(counters["validated"], counters["batch_idx"])
        return counters

    def gathered(self) -> dict[str, Any]:
        """What the running epoch has gathered: the values to be reduced at its end, and the loader's own state."""
        fit = self.trainer.last_fit
        if fit is not None and fit.unfinished is not None:
            return fit.unfinished
        counters = self.progress()
        position = self.loaders.train_state(counters["batch_idx"])
        loader = None if position is None else position["loader"]
        cursor = None if position is None else position["cursor"]
        return {
            "loader": loader_state(counters, loader, cursor),
            "logged": {
                "metrics": self.metrics.state_dict(),
                "metric_states": metric_states(self.module),
            },
            "saved_by": self.trainer.world_size,
        }

    def end_by_signal(self) -> NoReturn:
        """Save a checkpoint, and end as the signal asks that all ranks have agreed on.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for others, with the exit code of a process that the signal ended: 128 + its number.
        """
        number = signal.Signals(self.consensus.signal)
        callback = self.trainer.checkpoint_callback
        path = "" if callback is None else callback.save_now(self.trainer)
        self.consensus.note_saved_for_signal(bool(path))
        if self.trainer.is_global_zero:
            step = self.state.global_step
            if path:
                outcome = f"saved {path}"
            elif callback is None:
                outcome = "there is no ModelCheckpoint, nothing is saved"
            else:
                outcome = "no checkpoint could be saved"
            log.warning("%s at step %d: %s; ending", number.name, step, outcome)
        is_at_start = callback is not None and self.state.global_step == 0
        if path or is_at_start:
            self.signals.requeue(number, bool(path))
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
