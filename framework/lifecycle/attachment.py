"""Attaching a module to the Trainer that runs it, and giving it back unchanged to one that was running it already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..datamodule import DataHooks
from ..metrics.metric_state import load_metric_states, metric_states
from ..seed import isolated_rng

if TYPE_CHECKING:
    from ..module import Module
    from ..trainer import Trainer


@contextmanager
def attached(
    trainer: Trainer, module: Module, datamodule: Any, changes_weights: bool
) -> Iterator[None]:
    """Let ``trainer`` be the Trainer of a module and its data, for one run.

    Where another Trainer is running any of them, as when this run was called in one of its hooks, they go back to it
    afterwards, and the other run does not notice: not by Trainers, training modes, gradients, dtypes, devices, metrics,
    torch's settings or random numbers.

    Args:
        trainer: the one whose run begins.
        module: what it runs.
        datamodule: its data, or None.
        changes_weights: whether parameters that this run has converted keep their new values.

    Raises:
        RuntimeError: if it would convert parameters whose gradients the other run averages over processes.
    """
    parts = [
        part for part in (*module.modules(), datamodule) if isinstance(part, DataHooks)
    ]
    outer = [
        (part, owner)
        for part in parts
        if (owner := part.__dict__.get("_trainer")) and owner.is_running
    ]
    for _, owner in outer:
        _require_same_precision(trainer, owner)
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    # The usual case. The module stays with this Trainer, whose results can be read from it after the run.
    if not outer:
        yield
        return
    with isolated_rng(outer[0][1].engine.device), _unchanged(module, changes_weights):
        try:
            yield
        finally:
            for part, owner in outer:
                part.trainer = owner


def _require_same_precision(trainer: Trainer, owner: Trainer) -> None:
    """Raise if ``trainer`` would convert parameters whose gradients ``owner`` averages over processes."""
    own = trainer.engine
    outer = owner.engine
    same = own.device == outer.device and own.precision.parameters in (
        None,
        outer.precision.parameters,
    )
    if owner.world_size > 1 and not same:
        # A parameter that is moved, or gets another dtype, loses the hooks by which its gradients are averaged.
        raise RuntimeError(
            f"a run with precision={trainer.precision!r} on {own.device} would convert the module that another Trainer "
            f"is running in {owner.world_size} processes, with precision={owner.precision!r} on {outer.device}: use "
            "the same precision and device, or run copy.deepcopy(module)"
        )


@contextmanager
def _unchanged(module: nn.Module, changes_weights: bool) -> Iterator[None]:
    """Put back, at the end, what a run changes of a module and of torch's settings."""
    modes = {part: part.training for part in module.modules()}
    parameters = [
        (parameter, parameter.requires_grad, parameter.grad)
        for parameter in module.parameters()
    ]
    # Or else this run would add to the gradients of an accumulation window that the other one has open.
    for parameter in module.parameters():
        parameter.grad = None
    values = [
        (tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())
    ]
    metrics = metric_states(module)
    deterministic = torch.get_deterministic_debug_mode()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.set_deterministic_debug_mode(deterministic)
        for tensor, value in values:
            if tensor.dtype != value.dtype or tensor.device != value.device:
                # The tensor from before, if its values were not to change: converting this one back would not restore
                # what rounding to fewer bits has lost.
                tensor.data = tensor.data.to(value) if changes_weights else value
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        load_metric_states(module, metrics)
        for part, training in modes.items():
            part.training = training
