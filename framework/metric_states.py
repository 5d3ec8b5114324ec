"""The states of a module's torchmetrics: in and out of a checkpoint, and gathered from several processes."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .batches import map_tensors


def is_metric(value: Any) -> bool:
    """Whether ``value`` is a torchmetrics ``Metric``; torchmetrics is not imported to find out."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def _metrics_of(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, metric) for name, metric in module.named_modules() if is_metric(metric)]


def list_states(metric: Any) -> dict[tuple[str, str], Any]:
    """The states that are lists, of a ``Metric`` and those inside it: length, an element's dtype and shape."""
    return {
        (path, name): (len(value), *((value[0].dtype, tuple(value[0].shape)) if value else (None, ())))
        for path, part in _metrics_of(metric)
        for name, value in part.metric_state.items()
        if isinstance(value, list)
    }


def fill_list_states(metric: Any, told: list[dict[tuple[str, str], Any]]) -> None:
    """Put an empty tensor into each list that is empty here only: torchmetrics gathers equal types and dimensions.

    Args:
        metric: the logged metric.
        told: what :func:`list_states` says in each process.

    Raises:
        RuntimeError: for lists that are gathered element by element and whose lengths differ.
    """
    parts = dict(_metrics_of(metric))
    for path, name in list_states(metric):
        part = parts[path]
        lengths = [states[path, name][0] for states in told]
        if getattr(part._reductions[name], "__name__", "") == "dim_zero_cat":
            found = [states[path, name] for states in told if states[path, name][0]]
            if found and not part.metric_state[name]:
                _, dtype, shape = found[0]
                part.metric_state[name].append(torch.empty((0, *shape[1:]), dtype=dtype, device=part.device))
        elif len(set(lengths)) > 1:
            raise RuntimeError(
                f"{type(part).__name__} keeps a list {name!r} that torchmetrics gathers element by element, and its "
                f"lengths by rank are {lengths}; they must be equal"
            )


def metric_states(module: torch.nn.Module) -> dict[str, Any]:
    """Copies of the states of a module's torchmetrics, which ``state_dict`` leaves out, by the metrics' names."""
    # A metric adds to its tensors in place, and its reset clears its lists in place.
    return {
        name: {
            "update_count": metric._update_count,
            "state": {key: _copy_state(value) for key, value in metric.metric_state.items()},
        }
        for name, metric in _metrics_of(module)
    }


def _copy_state(value: Any) -> Any:
    return [_copy_state(item) for item in value] if isinstance(value, list) else value.detach().clone()


def load_metric_states(module: torch.nn.Module, states: dict[str, Any]) -> None:
    """Take back :func:`metric_states`."""
    for name, metric in _metrics_of(module):
        if name in states:
            metric._update_count = states[name]["update_count"]
            metric._computed = None
            device = metric.device
            for key, value in states[name]["state"].items():
                setattr(metric, key, map_tensors(value, lambda tensor, device=device: tensor.to(device)))
