"""The loops of validation, test and prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..data.batches import move_batch
from ..data.iteration import INFINITE
from ..engine.explanations import explain_evaluation
from ..metrics.metric_state import load_metric_states, metric_states
from ..seed import isolated_rng, rng_state, set_rng_state
from .step import step_arguments

if TYPE_CHECKING:
    from ..trainer import Trainer


# What the hooks and steps of an evaluation are called.
_NAMES = {
    "validate": "validation",
    "sanity_check": "validation",
    "test": "test",
    "predict": "predict",
}


def waiting_plateau_step(trainer: Trainer) -> None:
    """Step the schedulers that monitor a value by steps, if they have not done so since the last window."""
    if trainer.state.plateau_waits:
        trainer.state.plateau_waits = False
        trainer.optimization.plateau_step(lambda: trainer.callback_metrics)


class _LeftForSignal(Exception):
    """A validation was left, as a signal asks to end."""


def sanity_check(trainer: Trainer) -> None:
    """Run a few validation batches, so that a mistake there shows before the first epoch, and undo their traces."""
    if not trainer.num_sanity_val_steps or not trainer.enable_validation:
        return
    state, bus, metrics = trainer.state, trainer.bus, trainer.metrics
    kept = metric_states(trainer.module)
    with isolated_rng(trainer.engine.device):
        state.stage = "sanity_check"
        for hook in bus.on_sanity_check_start:
            hook()
        if trainer.load_val_data():
            limit = (
                INFINITE
                if trainer.num_sanity_val_steps == -1
                else trainer.num_sanity_val_steps
            )
            limits = [min(limit, most) for most in trainer.data.max_batches["validate"]]
            evaluate(trainer, "sanity_check", trainer.data.loaders["validate"], limits)
        for hook in bus.on_sanity_check_end:
            hook()
    state.stage = None
    metrics.forget()
    load_metric_states(trainer.module, kept)


def validate(trainer: Trainer, asked: bool = True) -> None:
    """Validate inside ``fit``, if there is what to validate on and it was not done for this batch already."""
    state = trainer.state
    if state.validated == state.batch_idx or not trainer.enable_validation:
        return
    if asked and not trainer.validation_due_in_epoch():
        return
    if not trainer.optimization.window_is_open:
        for hook in trainer.zero_grad_hook():
            hook()
    if not trainer.load_val_data():
        return
    before = trainer.metrics.enter(None, None)
    kept = (
        (rng_state(trainer.engine.device), metric_states(trainer.module))
        if trainer.world_size == 1
        else None
    )
    state.stage = "validate"
    try:
        evaluate(
            trainer,
            "validate",
            trainer.data.loaders["validate"],
            trainer.data.max_batches["validate"],
        )
    except _LeftForSignal:
        assert kept is not None
        trainer.metrics.discard()
        set_rng_state(kept[0], trainer.engine.device)
        load_metric_states(trainer.module, kept[1])
        trainer.restore_training_mode()
        trainer.end_by_signal()  # the run that goes on from there begins with this validation
    state.stage = "train"
    trainer.metrics.enter(*before)
    trainer.control.agree(state.batch_idx)


def evaluate(
    trainer: Trainer,
    stage: str,
    loaders: list[Any],
    limits: list[int | float],
    verbose: bool = False,
) -> list[dict[str, float]]:
    """Run the validation or test loop.

    ::

        on_<stage>_model_eval
        on_<stage>_start, on_<stage>_epoch_start
        for each loader, for each batch:
            on_<stage>_batch_start, <stage>_step, on_<stage>_batch_end
        on_<stage>_epoch_end                    # then the values are reduced and logged
        on_<stage>_end
        on_<stage>_model_train

    Returns:
        A dict of values for each loader.
    """
    name, metrics, state, bus = (
        _NAMES[stage],
        trainer.metrics,
        trainer.state,
        trainer.bus,
    )
    module = trainer.module
    trainer.remember_training_mode()
    trainer.engine.start_evaluation()
    with _no_gradients(trainer):
        getattr(module, f"on_{name}_model_eval")()
        metrics.enter(name, "epoch")
        metrics.discard()  # what an evaluation left that an exception ended
        for hook in (
            *getattr(bus, f"on_{name}_start"),
            *getattr(bus, f"on_{name}_epoch_start"),
        ):
            hook()
        metrics.moment = "batch"
        _run_batches(trainer, name, loaders, limits, None)
        metrics.moment = "epoch"
        metrics.reduce_epoch()
        for hook in getattr(bus, f"on_{name}_epoch_end"):
            hook()
        results = metrics.end_epoch()
        metrics.moment = None
        if stage != "sanity_check":
            trainer.log_row(results.logged)
        for hook in getattr(bus, f"on_{name}_end"):
            hook()
        if stage == "validate" and state.fn == "fit":
            state.validated = state.batch_idx
            waiting_plateau_step(trainer)
        for hook in bus.on_validation_end_late if name == "validation" else ():
            hook()
        getattr(module, f"on_{name}_model_train")()
    metrics.enter(None, None)
    return metrics.by_loader(results, len(loaders))


def predict(
    trainer: Trainer, loaders: list[Any], limits: list[int | float], keep: bool
) -> list[Any]:
    """Run the prediction loop, as :func:`evaluate` does; returns by loader, on the CPU, what ``predict_step`` did."""
    bus, module = trainer.bus, trainer.module
    trainer.remember_training_mode()
    trainer.engine.start_evaluation()
    outputs: list[list[Any]] = [[] for _ in loaders]
    with _no_gradients(trainer):
        module.on_predict_model_eval()
        for hook in (*bus.on_predict_start, *bus.on_predict_epoch_start):
            hook()
        _run_batches(trainer, "predict", loaders, limits, outputs if keep else None)
        for hook in (*bus.on_predict_epoch_end, *bus.on_predict_end):
            hook()
    trainer.restore_training_mode()
    return outputs


def _run_batches(
    trainer: Trainer,
    name: str,
    loaders: list[Any],
    limits: list[int | float],
    keep: list[list[Any]] | None,
) -> None:
    bus, metrics = trainer.bus, trainer.metrics
    on_start, on_end = (
        getattr(bus, f"on_{name}_batch_start"),
        getattr(bus, f"on_{name}_batch_end"),
    )
    step_name = f"{name}_step"
    takes = step_arguments(getattr(trainer.module, step_name))
    transfer, forward = trainer.data.transfer(), trainer.engine.evaluate
    several = len(loaders) > 1
    stage = "validate" if name == "validation" else name
    metrics.without_batch = set()
    in_all = trainer.data.batches_in_all(stage)
    control, in_fit, several_processes = (
        trainer.control,
        trainer.state.fn == "fit",
        trainer.world_size > 1,
    )
    for index, limit in enumerate(limits):
        metrics.dataloader_idx = index if several else None
        place = (index,) if several else ()
        batch_idx = -1
        for batch, own in trainer.data.batches(stage, index, limit):
            if transfer is not None:
                batch = transfer(batch, index)
            if not own:
                _keep_company(trainer, step_name, *(batch, batch_idx, *place)[:takes])
                continue
            batch_idx += 1
            metrics.batch = batch
            trainer.data.alone = batch_idx >= in_all[index]
            for hook in on_start:
                hook(batch, batch_idx, *place)
            try:
                output = forward(step_name, *(batch, batch_idx, *place)[:takes])
            except RuntimeError as error:
                explain_evaluation(error, step_name)
                raise
            for hook in on_end:
                hook(output, batch, batch_idx, *place)
            if keep is not None:
                # A host–device sync: predictions that stayed on the device would fill it.
                keep[index].append(move_batch(output, torch.device("cpu")))
            # In several processes, its peers would wait in what is collective; and inside a window, a checkpoint would
            # go back to before this validation.
            if (
                control.signal
                and in_fit
                and batch_idx + 1 < limit
                and not (several_processes or trainer.window_is_open)
            ):
                raise _LeftForSignal
        if batch_idx < 0:
            if limit and trainer.world_size == 1:
                raise RuntimeError(
                    f"{name} loader {index} gave no batch; an iterator can be read once only"
                )
            metrics.without_batch.add(metrics.dataloader_idx)
    metrics.dataloader_idx = None
    metrics.batch = None
    trainer.data.alone = False
    trainer.data.check_streams()


def _keep_company(trainer: Trainer, step_name: str, *args: Any) -> None:
    """Run a step whose forward the other processes wait for, and that counts nothing."""
    kept = metric_states(trainer.module)
    trainer.metrics.is_dummy = True
    trainer.engine.evaluate(step_name, *args)
    trainer.metrics.is_dummy = False
    load_metric_states(trainer.module, kept)


def _no_gradients(trainer: Trainer) -> AbstractContextManager[Any]:
    # Inside fit, a tensor that a module keeps from validation may meet autograd later: no inference mode there.
    return trainer.engine.without_gradients(
        trainer.inference_mode and trainer.state.fn != "fit"
    )
