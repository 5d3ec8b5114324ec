"""A few steps or batches of a run that try something out, after which all is as it was before."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.out_of_memory import free_memory, leaving_together
from ..loop.evaluate import try_batches
from ..loop.fit import fit
from ..loop.run import Run, RunRequest
from ..loop.together import together_step
from .attachment import attached

if TYPE_CHECKING:
    from ..trainer import Trainer


def rehearse(run: Run, trainer: Trainer, steps: int, together: bool) -> None:
    """Take some steps of a fit, or run some batches of each loader of an evaluation, and undo them.

    Args:
        run: the run whose model, optimizers and data are used.
        trainer: a copy of its Trainer for this purpose, with callbacks, counters and logged values of its own.
        steps: how many optimizer steps or batches.
        together: let all processes leave a step together if memory runs out in one of them.

    Raises:
        torch.OutOfMemoryError: if memory ran out. It holds no part of what was computed.
        ValueError: if the training loader can be read once only; or for ``together`` where processes meet inside steps.
    """
    request = RunRequest(run.fn, run.module, run.datamodule, run.loaders.given)
    trainer.run = trial = Run(trainer, request, NoSignals())
    # Where processes meet inside steps, one that runs out of memory has nobody to tell.
    is_alone = run.engine.num_processes == 1
    with attached(trainer, run.module, run.datamodule, changes_weights=True):
        before = _Before(run)
        try:
            with leaving_together(run.engine) if is_alone else nullcontext():
                if run.fn == "fit":
                    _take_steps(run, trial, before, together)
                else:
                    try_batches(trial, steps)
        finally:
            trial.loaders.close()
            trainer.state.end("finished")
            before.restore()
            free_memory(run.engine.device)


def _take_steps(run: Run, trial: Run, before: _Before, together: bool) -> None:
    """Train with the run's optimizers from an epoch's begin, to the last step that the trial's Trainer allows.

    Args:
        run: the run.
        trial: the one that does it, and is not seen afterwards.
        before: what is put back.
        together: as of :func:`rehearse`.
    """
    kind = type(run.step)
    if together and run.engine.num_processes > 1:
        kind = together_step(run)
    trial.begin_fit(kind(trial, run.step.optimizers, [], []))
    trial.note_eval_mode()
    trial.loaders.load_train()
    before.note_loaders(trial)
    fit(trial)


class NoSignals:
    """Notes no signals: they do what they did before."""

    in_a_hurry = False

    def begin(self) -> None:
        """Do nothing, as the other methods."""

    stand_by = end = send_again = wait_for_main = begin

    def requeue(self, number: int, has_saved: bool) -> None:
        """Do nothing."""


class _Before:
    """What a rehearsal changes of a run, beside what :func:`attached` puts back; tensors wait in the CPU's memory.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        module = run.module
        engine = run.engine
        tensors = (*module.parameters(), *module.buffers())
        with torch.no_grad():
            parts = map(engine.strategy.local_part, tensors)
            copies = [part.to("cpu", copy=True) for part in parts]
        self._tensors = list(zip(tensors, copies, strict=True))
        self._restores = [_lend_attributes(part) for part in module.modules()]
        self._scale = None
        self._loaders: list[tuple[Any, Any]] = []
        if run.fn == "fit":
            self._restores += map(_optimizer, run.step.optimizers)
            if engine.scaler is not None:
                self._scale = engine.scaler.state_dict()

    def note_loaders(self, trial: Run) -> None:
        """Keep the states of loaders that have some, before they are read.

        Raises:
            ValueError: for one that cannot be read again.
        """
        train = trial.loaders.train
        for part in () if train is None else train.source.parts:
            if part.reads_once:
                raise ValueError(
                    f"the training loader ({type(part.loader).__name__}) can be read once only, and a trial would take "
                    "its first batches away: pass a loader that can be begun again"
                )
            if part.stateful:
                state = copy.deepcopy(part.loader.state_dict())
                self._loaders.append((part.loader, state))

    def restore(self) -> None:
        """Put all of it back."""
        run = self._run
        engine = run.engine
        with torch.no_grad():
            for tensor, value in self._tensors:
                engine.strategy.local_part(tensor).copy_(value)
        for restore in self._restores:
            restore()
        for loader, state in self._loaders:
            loader.load_state_dict(state)
        if run.fn == "fit":
            engine.end_window()
            if self._scale is not None and engine.scaler is not None:
                engine.scaler.load_state_dict(self._scale)
            engine.accumulation.count_in(run.state)


def _optimizer(optimizer: Any) -> Callable[[], None]:
    """Copy what an optimizer holds; returns what puts that back into the same groups."""
    state = {p: copy.deepcopy(value) for p, value in optimizer.state.items()}
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            for key in group.keys() - saved.keys() - {"params"}:
                del group[key]
            group.update(saved)

    return restore


def _lend_attributes(part: nn.Module) -> Callable[[], None]:
    """Let a rehearsal have copies of a module's own tensors and collections; returns what puts all attributes back."""
    torchs = vars(nn.Module()).keys()
    attributes = vars(part)
    own = {name: attributes[name] for name in attributes.keys() - torchs}
    for name, value in own.items():
        if isinstance(value, Tensor):
            attributes[name] = value.detach().clone()
        elif isinstance(value, (list, dict, set, deque)):
            attributes[name] = copy.copy(value)

    def restore() -> None:
        for name in attributes.keys() - torchs - own.keys():
            del attributes[name]
        attributes.update(own)

    return restore
