"""The weights of a run beside those that it trains: evaluations run on them, and no checkpoint takes them for those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ...strategies.tensor_shards import full_state
from ..messages import log

if TYPE_CHECKING:
    from ...callbacks.weight_set import WeightSet
    from ..trainer import Trainer
    from .run import Run
    from .schedule_free import ScheduleFree


def weight_sets(trainer: Trainer) -> list[WeightSet]:
    """The sets of the Trainer's callbacks.

    Raises:
        ValueError: if two have one name, or evaluations would run on two.
    """
    sets = [
        callback.weight_set
        for callback in trainer.callbacks
        if callback.weight_set is not None
    ]
    names = [weights.name for weights in sets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two callbacks keep weights of one name: {', '.join(names)}; pass another name to one of them"
        )
    evaluated = [weights.name for weights in sets if weights.is_evaluated]
    if len(evaluated) > 1:
        raise ValueError(
            f"evaluations can run on the weights of one callback only, not on those of {', '.join(evaluated)}: pass "
            "evaluate=False to the others"
        )
    return sets


def evaluated_name(trainer: Trainer) -> str | None:
    """The name of the set that evaluations run on, if there is one."""
    sets = weight_sets(trainer)
    return next((weights.name for weights in sets if weights.is_evaluated), None)


def _sets_of(run: Run) -> list[WeightSet]:
    """The sets that have been made of the run's module."""
    fit = run.trainer.last_fit
    is_of_module = fit is not None and fit.module is run.module
    return weight_sets(run.trainer) if is_of_module else []


def _schedule_free(run: Run) -> list[ScheduleFree]:
    """What changes the modes of the module's optimizers, if a fit has made them in this process."""
    fit = run.trainer.last_fit
    if fit is None or fit.step is None or fit.module is not run.module:
        return []
    return [fit.step.schedule_free]


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """A context in which the run's module has the weights that evaluations run on."""
    with ExitStack() as contexts:
        for optimizers in _schedule_free(run):
            contexts.enter_context(optimizers.evaluating())
        # What such a run has loaded are these weights already.
        is_loaded = run.fn != "fit" and run.ckpt_path is not None
        for weights in () if is_loaded else _sets_of(run):
            if weights.is_evaluated and weights.tensors:
                strategy = run.engine.strategy
                contexts.enter_context(weights.within(run.module, strategy))
                # Averages of buffers differ between processes as the buffers do.
                run.engine.start_evaluation()
        yield


@contextmanager
def saving(run: Run) -> Iterator[None]:
    """A context in which the run's module has the weights that are trained; of a schedule-free optimizer, its own."""
    with ExitStack() as contexts:
        for optimizers in _schedule_free(run):
            contexts.enter_context(optimizers.evaluating())
        for weights in _sets_of(run):
            without = weights.without(run.module, run.engine.strategy)
            contexts.enter_context(without)
        yield


def states(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of the sets, by name."""
    strategy = run.engine.strategy
    sets = _sets_of(run) + [each.weights for each in _schedule_free(run)]
    return {s.name: s.state(run.module, strategy) for s in sets if s.tensors}


def state(run: Run, name: str | None) -> dict[str, Any]:
    """Inside :func:`saving`, the weights that are trained, or those of a set in their place.

    Raises:
        ValueError: if there is no such set, or it has had no update.
    """
    state = run.engine.strategy.model_state()
    if name is None:
        return state
    sets = states(run)
    if name not in sets:
        names = ", ".join(map(repr, sets)) or "none"
        raise ValueError(
            f"no callback of this Trainer has weights weight_set={name!r}; those that there are: {names}"
        )
    return {**state, **sets[name]}


# A fit's beginning and end.


def begin(run: Run) -> None:
    """Before the strategy takes the module for a fit: give it the weights back that the last one has trained."""
    for optimizers in _schedule_free(run):
        optimizers.train()
    for weights in weight_sets(run.trainer):
        if not _sets_of(run):
            weights.clear()
            continue
        is_in_module = weights.is_in_module
        if is_in_module and not weights.take_out(run.module, run.engine.strategy):
            weights.clear()
            log.warning(
                "The module's weights have been changed since its last fit: they are trained on, and %r begins anew",
                weights.name,
            )


def load(run: Run, checkpoint: dict[str, Any]) -> None:
    """Take the sets that a checkpoint holds, once the optimizers are set up."""
    saved = checkpoint.get("weight_sets", {})
    sets = weight_sets(run.trainer)
    _tell_of_begun(run, checkpoint)
    if run.step.schedule_free.optimizers:
        sets.append(run.step.schedule_free.weights)
    for weights in sets:
        if weights.name in saved:
            weights.load(saved[weights.name], run.module, run.engine.strategy)
        else:
            weights.clear()
    known = {weights.name for weights in sets}
    if absent := sorted(saved.keys() - known):
        log.warning(
            "The checkpoint holds weights that no callback of this Trainer keeps: %s",
            ", ".join(absent),
        )


def _tell_of_begun(run: Run, checkpoint: dict[str, Any]) -> None:
    """Say which sets begin now, as their callbacks were not there when the checkpoint was saved."""
    states = checkpoint.get("callbacks", {})
    for callback in run.trainer.callbacks:
        weights = callback.weight_set
        if weights is not None and callback.state_key not in states:
            run.warn_once(
                f"The checkpoint is of a run without {type(callback).__name__}: its weights {weights.name!r} begin "
                "with the next update"
            )


def end(run: Run) -> None:
    """After a fit: let the module have the weights that evaluations run on, or else those of the first set."""
    run.step.schedule_free.eval()
    sets = [weights for weights in _sets_of(run) if weights.tensors]
    sets.sort(key=lambda weights: not weights.is_evaluated)
    for weights in sets[:1]:
        weights.leave_in(run.module, run.engine.strategy)


def gather(run: Run) -> None:
    """Take the sets out of the module, and put them together on the CPU, before the processes end. A collective."""
    strategy = run.engine.strategy
    for weights in _sets_of(run):
        is_in_module = weights.is_in_module
        if is_in_module:
            weights.take_out(run.module, strategy)
        whole = full_state(strategy, weights.state(run.module, strategy))
        weights.gather(whole, is_in_module)


def put_back(run: Run) -> None:
    """Put the sets into the module, in another process, that :func:`gather` has taken out."""
    for weights in _sets_of(run):
        if weights.belongs_in_module:
            weights.leave_in(run.module, run.engine.strategy)
