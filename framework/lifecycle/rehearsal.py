"""A few steps or batches of a run that try something out, after which all is as it was before."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.out_of_memory import free_memory, is_out_of_memory
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
    out_of_memory = None
    with attached(trainer, run.module, run.datamodule, changes_weights=True):
        before = _Before(run)
        try:
            if run.fn == "fit":
                _take_steps(run, trial, before, together)
            else:
                try_batches(trial, steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The error itself holds the step's frames, and so its memory.
            out_of_memory = str(error)
        finally:
            trial.loaders.close()
            trainer.state.end("finished")
            before.restore()
    if out_of_memory is not None:
        free_memory(run.engine.device)
        raise torch.OutOfMemoryError(out_of_memory)


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

    end = send_again = begin


class _Before:
    """What a rehearsal changes of a run, beside what :func:`attached` puts back; tensors wait in the CPU's memory.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        module, engine = run.module, run.engine
        with torch.no_grad():
            self._tensors = [
                (tensor, _own_part(tensor).to("cpu", copy=True))
                for tensor in (*module.parameters(), *module.buffers())
            ]
        self._attributes = [
            function for part in module.modules() for function in _attributes_of(part)
        ]
        self._optimizers = []
        self._scale = None
        self._loader = engine.accumulation.loader
        self._loaders: list[tuple[Any, Any]] = []
        if run.fn == "fit":
            self._optimizers = [_optimizer(each) for each in run.step.optimizers]
            if engine.scaler is not None:
                self._scale = engine.scaler.state_dict()

    def note_loaders(self, trial: Run) -> None:
        """Keep the states of loaders that have some, before they are read.

        Raises:
            ValueError: for one that cannot be read again.
        """
        train = trial.loaders.train
        for part in () if train is None else train.source.parts:
            if part.keeps_iterator or isinstance(part.loader, Iterator):
                raise ValueError(
                    f"the training loader ({type(part.loader).__name__}) can be read once only, and a trial would take "
                    "its first batches away: pass a loader that can be begun again"
                )
            if part.stateful:
                state = copy.deepcopy(part.loader.state_dict())
                self._loaders.append((part.loader, state))

    def restore(self) -> None:
        """Put all of it back."""
        run, engine = self._run, self._run.engine
        with torch.no_grad():
            for tensor, value in self._tensors:
                _own_part(tensor).copy_(value)
        for restore in (*self._attributes, *self._optimizers):
            restore()
        for loader, state in self._loaders:
            loader.load_state_dict(state)
        if run.fn == "fit":
            engine.end_window()
            if self._scale is not None and engine.scaler is not None:
                engine.scaler.load_state_dict(self._scale)
            engine.accumulation.count_in(run.state)
            engine.accumulation.over(run.trainer.accumulate_grad_batches)
            engine.accumulation.read_from(self._loader)


def _optimizer(optimizer: Any) -> Callable[[], None]:
    """Copy what an optimizer holds; returns what puts that back into the same groups."""
    own = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    state = copy.deepcopy(dict(optimizer.state), dict(own))
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


# What a module's attributes hold that can be put back: values, and plain collections of anything.
_VALUES = (bool, int, float, complex, str, bytes, tuple, type(None))


def _attributes_of(part: nn.Module) -> list[Callable[[], None]]:
    """Note a module's own attributes, such as counters and lists; returns what puts them back."""
    torchs = vars(nn.Module())
    attributes = vars(part)
    restore: list[Callable[[], None]] = []
    kept = {name: value for name, value in attributes.items() if name not in torchs}
    for name, value in kept.items():
        content = _content_of(value)
        if content is not None:
            restore.append(content)
        if content is not None or isinstance(value, _VALUES):
            restore.append(partial(attributes.__setitem__, name, value))

    def forget_new() -> None:
        for name in attributes.keys() - kept.keys() - torchs.keys():
            del attributes[name]

    return [*restore, forget_new]


def _content_of(value: Any) -> Callable[[], None] | None:
    """Note what is in a tensor or collection; returns what puts it back, or None for other objects."""
    if isinstance(value, Tensor):
        if value.is_inference():
            return None
        return partial(_fill_tensor, value, value.detach().to("cpu", copy=True))
    if isinstance(value, (list, deque)):
        return partial(_fill, value, value.extend, list(value))
    if isinstance(value, (dict, set)):
        return partial(_fill, value, value.update, copy.copy(value))
    return None


def _fill(collection: Any, fill: Callable[[Any], None], content: Any) -> None:
    collection.clear()
    fill(content)


def _fill_tensor(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _own_part(tensor: Any) -> Tensor:
    """What this process has of a tensor, which may be distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
