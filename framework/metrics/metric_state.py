"""The states of a module's torchmetrics: in and out of a checkpoint, and gathered from several processes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..data.batches import map_tensors

# How to join a state of several processes, by the name of its reduction in torchmetrics.
_MERGES: dict[str, Any] = {
    "dim_zero_sum": torch.sum,
    "dim_zero_max": torch.amax,
    "dim_zero_min": torch.amin,
}


def is_metric(value: Any) -> bool:
    """Whether ``value`` is a torchmetrics ``Metric``; torchmetrics is not imported to find out."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def _metrics_of(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, metric) for name, metric in module.named_modules() if is_metric(metric)
    ]


@contextmanager
def unchanged_metrics(module: torch.nn.Module) -> Iterator[None]:
    """Put the states of a module's torchmetrics back afterwards, unless an exception ends the block."""
    states = metric_states(module)
    yield
    load_metric_states(module, states)


@contextmanager
def own_metrics(module: torch.nn.Module, world_size: int) -> Iterator[None]:
    """Keep torchmetrics from adding up over processes of which each runs ``module`` by itself."""
    alone = (
        world_size == 1
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )
    metrics = [metric for _, metric in _metrics_of(module)] if alone else []
    before = [metric.distributed_available_fn for metric in metrics]
    for metric in metrics:
        metric.distributed_available_fn = _no_peers
    try:
        yield
    finally:
        for metric, available in zip(metrics, before, strict=True):
            metric.distributed_available_fn = available


def _no_peers() -> bool:
    return False


def list_states(metric: Any) -> dict[tuple[str, str], Any]:
    """The states that are lists, of a ``Metric`` and those inside it: length, an element's dtype and shape."""
    return {
        (path, name): (
            len(value),
            *((value[0].dtype, tuple(value[0].shape)) if value else (None, ())),
        )
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
                part.metric_state[name].append(
                    torch.empty((0, *shape[1:]), dtype=dtype, device=part.device)
                )
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
            "state": {
                key: _copy_state(value) for key, value in metric.metric_state.items()
            },
        }
        for name, metric in _metrics_of(module)
    }


def _copy_state(value: Any) -> Any:
    return (
        [_copy_state(item) for item in value]
        if isinstance(value, list)
        else value.detach().clone()
    )


def load_metric_states(module: torch.nn.Module, states: dict[str, Any]) -> None:
    """Take back :func:`metric_states`."""
    for name, metric in _metrics_of(module):
        if name in states:
            metric._update_count = states[name]["update_count"]
            metric._computed = None
            device = metric.device
            for key, value in states[name]["state"].items():
                setattr(
                    metric,
                    key,
                    map_tensors(value, lambda tensor, device=device: tensor.to(device)),
                )


def merge_metric_states(
    module: torch.nn.Module, states: list[dict[str, Any]], keep: bool
) -> dict[str, Any]:
    """One of what :func:`metric_states` gave in several processes: each state reduced as torchmetrics would.

    Args:
        module: holds the metrics.
        states: by rank.
        keep: False gives the states of metrics that have seen nothing, as another process has the values.

    Raises:
        CheckpointError: for a state that torchmetrics does not reduce by sum, minimum, maximum or concatenation.
    """
    merged: dict[str, Any] = {}
    for name, metric in _metrics_of(module):
        own = [state[name] for state in states if name in state]
        seen = [state for state in own if state["update_count"]]
        if not seen:
            continue
        values = {
            key: _merge(metric, key, [state["state"][key] for state in seen])
            if keep
            else copy.deepcopy(default)
            for key, default in metric._defaults.items()
        }
        merged[name] = {
            "update_count": sum(state["update_count"] for state in seen),
            "state": values,
        }
    return merged


def _merge(metric: Any, key: str, values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    how = getattr(metric._reductions[key], "__name__", "")
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    if how == "dim_zero_cat":
        return torch.cat(values)
    if how in _MERGES:
        return _MERGES[how](torch.stack(values), 0)
    from ..errors import CheckpointError

    raise CheckpointError(
        f"the checkpoint was saved inside an epoch, and {type(metric).__name__} keeps a state {key!r} that cannot be "
        "joined over processes: resume with as many processes as saved it, or from an epoch's end"
    )
