"""The loops of validation, test and prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..data.device_input import move_batch
from ..data.iteration import INFINITE
from ..engine.out_of_memory import leaving_together
from ..engine.step_errors import explain_evaluation
from ..metrics.metric_state import unchanged_metrics
from ..seed import isolated_rng
from . import weight_sets
from .loaders import limit_name
from .rollback import Rollback
from .step import step_arguments

if TYPE_CHECKING:
    from .run import Run

# What the hooks and steps of an evaluation are called, by stage.
_NAMES = {
    "validate": "validation",
    "sanity_check": "validation",
    "test": "test",
    "predict": "predict",
}


class _Evaluation:
    """The batches of one evaluation.

    Args:
        run: the run.
        name: what its hooks and steps are called.
        outputs: gets what the steps return, by loader; None to keep nothing.
    """

    def __init__(self, run: Run, name: str, outputs: list[list[Any]] | None) -> None:
        self.run = run
        self.name = name
        self.stage = "validate" if name == "validation" else name
        self.outputs = outputs
        self.step_name = f"{name}_step"
        self.num_arguments = step_arguments(getattr(run.module, self.step_name))
        # Values of steps that wait for the loggers, each with its batch, counted over the evaluations of a run.
        self.rows: list[tuple[int, dict[str, Any]]] = []
        is_logged = name != "predict" and not run.trainer.sanity_checking
        self.logs_steps = is_logged and bool(run.trainer.loggers)
        self.on_start = getattr(run.hooks, f"on_{name}_batch_start")
        self.on_end = getattr(run.hooks, f"on_{name}_batch_end")
        self.transfer = run.loaders.transfer()
        # A checkpoint that is saved inside an accumulation window resumes at the window's start, which is before this
        # validation.
        is_of_fit = run.fn == "fit" and run.state.stage == "validate"
        self.may_leave_for_signal = is_of_fit and not run.window_is_open

    def evaluate(self, limits: list[int | float]) -> bool:
        """Evaluate at most so many batches of each loader; False if a signal asks to end before all are done."""
        run = self.run
        counts = []
        for index, limit in enumerate(limits):
            dataloader_idx = index if len(limits) > 1 else None
            run.metrics.begin_loader(dataloader_idx)
            num_batches = self._evaluate_loader(index, dataloader_idx, limit)
            if num_batches is None:
                return False
            if num_batches == 0:
                self._note_empty(index, limit)
            counts.append(self._num_before(index) + num_batches)
        run.metrics.begin_loader(None)
        run.metrics.begin_batch(None)
        run.loaders.check_streams()
        for step, row in self.rows:
            run.trainer.log_row(row, step)
        if self.stage == "validate" and run.fn == "fit" and self.logs_steps:
            run.state.count_validation(counts)
        return True

    def _num_before(self, index: int) -> int:
        """How many batches of a loader the validations before have had."""
        counts = self.run.state.validation_batches if self.run.fn == "fit" else None
        return counts[index] if counts is not None and index < len(counts) else 0

    def _evaluate_loader(
        self, index: int, dataloader_idx: int | None, limit: int | float
    ) -> int | None:
        """Evaluate a loader; returns the number of its batches, or None if a signal asks to end before the last."""
        run = self.run
        forward = run.engine.evaluate
        more = () if dataloader_idx is None else (dataloader_idx,)
        batch_idx = -1
        run.consensus.begin_evaluation()
        for batch, is_dummy in run.loaders.evaluation_batches(self.stage, index, limit):
            if self.transfer is not None:
                batch = self.transfer(batch, index)
            if is_dummy:
                # Also where no batch of its own has come before.
                arguments = (batch, max(batch_idx, 0), *more)[: self.num_arguments]
                self._run_dummy(arguments)
                continue
            batch_idx += 1
            run.metrics.begin_batch(batch)
            for hook in self.on_start:
                hook(batch, batch_idx, *more)
            arguments = (batch, batch_idx, *more)[: self.num_arguments]
            try:
                output = forward(self.step_name, *arguments)
            except RuntimeError as error:
                explain_evaluation(error, self.step_name)
                raise
            for hook in self.on_end:
                hook(output, batch, batch_idx, *more)
            if self.logs_steps and (row := run.metrics.step_row()):
                self.rows.append((self._num_before(index) + batch_idx, row))
            if self.outputs is not None:
                # A host–device sync: predictions that stayed on the device would fill it.
                self.outputs[index].append(move_batch(output, torch.device("cpu")))
            if self.may_leave_for_signal and self._must_leave(batch_idx + 1, limit):
                return None
        return batch_idx + 1

    def _must_leave(self, num_batches: int, limit: int | float) -> bool:
        """Whether a signal asks to end after ``num_batches`` of a loader: all ranks leave after the same batch."""
        run = self.run
        consensus = run.consensus
        if run.loaders.others_have_ended:
            return False
        if num_batches >= consensus.evaluation_due:
            consensus.agree_in_evaluation(num_batches)
        is_last = run.engine.num_processes == 1 and num_batches >= limit
        return bool(consensus.signal) and not is_last

    def _run_dummy(self, arguments: tuple[Any, ...]) -> None:
        """Run the step on a dummy batch, which counts nothing: the other ranks' forwards wait for this one's."""
        run = self.run
        run.metrics.begin_batch(arguments[0], is_dummy=True)
        with unchanged_metrics(run.module):
            run.engine.evaluate(self.step_name, *arguments)

    def _note_empty(self, index: int, limit: int | float) -> None:
        """Raise if a loader gave nothing that was to be run; with several ranks, others may have had its batches."""
        if limit and self.run.engine.num_processes == 1:
            raise RuntimeError(
                f"{self.name} loader {index} gave no batch; an iterator can be read once only"
            )
        self.run.metrics.note_empty_loader()


def sanity_check(run: Run) -> None:
    """Run a few validation batches, to show mistakes before the first epoch; metrics and random states are put back."""
    trainer = run.trainer
    loaders = run.loaders
    if not trainer.num_sanity_val_steps or not trainer.enable_validation:
        return
    with unchanged_metrics(run.module), isolated_rng(run.engine.device):
        run.state.enter("sanity_check")
        run.hooks.call("on_sanity_check_start")
        if loaders.load_validation():
            most: int | float = trainer.num_sanity_val_steps
            if most == -1:
                most = INFINITE
            limits = [min(most, limit) for limit in loaders.max_batches["validate"]]
            evaluate(run, "sanity_check", limits)
        run.hooks.call("on_sanity_check_end")
    run.state.enter(None)
    run.metrics.forget()


def validate(run: Run, is_scheduled: bool = True) -> None:
    """Validate inside ``fit``, if there is what to validate on and it was not done for this batch already.

    Args:
        run: the fit.
        is_scheduled: only in epochs with validation.
    """
    state = run.state
    loaders = run.loaders
    if state.validated == state.batch_idx or not run.trainer.enable_validation:
        return
    if is_scheduled and not run.schedule.validates_in_epoch():
        return
    if not run.window_is_open:
        run.module.on_validation_model_zero_grad()
    if not loaders.load_validation():
        return
    before = Rollback(run.module, run.engine.device)
    state.enter("validate")
    with run.metrics.context(None, None), run.record.phase("validation"):
        results = evaluate(run, "validate", loaders.max_batches["validate"])
    if results is None:
        # The run that goes on from the checkpoint begins with this validation.
        before.undo()
        run.restore_training_mode()
        run.end_by_signal()
    state.enter("train")
    run.consensus.agree(state.batch_idx)
    # Once more: several ranks know only now how long it took.
    run.schedule.note_validation()


def evaluate(
    run: Run, stage: str, limits: list[int | float]
) -> list[dict[str, float]] | None:
    """Run the validation or test loop.

    ::

        on_<stage>_model_eval
        on_<stage>_start, on_<stage>_epoch_start
        for each loader, for each batch:
            on_<stage>_batch_start, <stage>_step, on_<stage>_batch_end
        on_<stage>_epoch_end                    # then the values are reduced and logged
        on_<stage>_end
        on_<stage>_model_train

    Args:
        run: the run.
        stage: ``"validate"``, ``"sanity_check"`` or ``"test"``.
        limits: how many batches of each loader to run at most.

    Returns:
        A dict of values for each loader; None if the evaluation was left for a signal, with nothing undone.
    """
    name = _NAMES[stage]
    metrics = run.metrics
    hooks = run.hooks
    run.remember_training_mode()
    run.engine.start_evaluation()
    with _without_gradients(run):
        getattr(run.module, f"on_{name}_model_eval")()
        metrics.enter(name, "epoch")
        # What an evaluation has left that an exception ended.
        metrics.discard()
        hooks.call(f"on_{name}_start")
        with weight_sets.evaluating(run):
            hooks.call(f"on_{name}_epoch_start")
            metrics.begin_batches()
            if not _Evaluation(run, name, None).evaluate(limits):
                metrics.discard()
                return None
            metrics.end_batches()
            metrics.reduce_epoch()
            hooks.call(f"on_{name}_epoch_end")
        results = metrics.end_epoch()
        if stage != "sanity_check":
            run.trainer.log_row(results.logged)
        hooks.call(f"on_{name}_end")
        getattr(run.module, f"on_{name}_model_train")()
    by_loader = metrics.by_loader(results, len(limits))
    metrics.enter(None, None)
    return by_loader


def predict(run: Run, limits: list[int | float], keep: bool) -> list[list[Any]]:
    """Run the prediction loop, as :func:`evaluate` does.

    Args:
        run: the run.
        limits: how many batches of each loader to run at most.
        keep: whether to keep what ``predict_step`` returns.

    Returns:
        What it returned, by loader, its tensors on the CPU.
    """
    outputs: list[list[Any]] = [[] for _ in limits]
    run.remember_training_mode()
    run.engine.start_evaluation()
    with _without_gradients(run):
        run.module.on_predict_model_eval()
        run.hooks.call("on_predict_start")
        with weight_sets.evaluating(run):
            run.hooks.call("on_predict_epoch_start")
            _Evaluation(run, "predict", outputs if keep else None).evaluate(limits)
            run.hooks.call("on_predict_epoch_end")
        run.hooks.call("on_predict_end")
        run.module.on_predict_model_train()
    return outputs


def try_batches(run: Run, num_batches: int) -> None:
    """Run some batches of each loader, as :func:`evaluate` and :func:`predict` do, without what follows the last.

    Args:
        run: an evaluation.
        num_batches: how many of each loader.

    Raises:
        torch.OutOfMemoryError: in all processes, if memory runs out in one.
    """
    hooks = run.hooks
    metrics = run.metrics
    if not run.loaders.load(run.fn, getattr(run.trainer, limit_name(run.fn))):
        return
    limits: list[int | float] = [
        min(num_batches, most) for most in run.loaders.max_batches[run.fn]
    ]
    name = _NAMES[run.fn]
    run.engine.start_evaluation()
    with _without_gradients(run):
        getattr(run.module, f"on_{name}_model_eval")()
        if name != "predict":
            metrics.enter(name, "epoch")
        hooks.call(f"on_{name}_start")
        hooks.call(f"on_{name}_epoch_start")
        metrics.begin_batches()
        with leaving_together(run.engine):
            _Evaluation(run, name, None).evaluate(limits)


def _without_gradients(run: Run) -> AbstractContextManager[Any]:
    """Switch gradients off: by inference mode where that is safe, or else by ``torch.no_grad``."""
    # Inside fit, a tensor that a module keeps from validation may meet autograd later, which refuses those of
    # inference mode.
    is_safe = run.trainer.inference_mode and run.fn != "fit"
    return run.engine.without_gradients(is_safe)
