"""The states of a module's torchmetrics: saved and loaded, put back, and joined over ranks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist

from ..data.batches import map_tensors
from ..errors import CheckpointError

# Values by name, as a checkpoint keeps them.
State = dict[str, Any]
# How to join the values that a state has on several ranks, by the name of its reduction in torchmetrics.
_MERGES: State = {
    "dim_zero_sum": torch.sum,
    "dim_zero_max": torch.amax,
    "dim_zero_min": torch.amin,
}


def is_metric(value: Any) -> bool:
    """Whether ``value`` is a torchmetrics ``Metric``; torchmetrics is not imported to find out."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def _metrics_of(module: torch.nn.Module) -> State:
    return {
        name: metric for name, metric in module.named_modules() if is_metric(metric)
    }


@contextmanager
def unchanged_metrics(module: torch.nn.Module) -> Iterator[None]:
    """Put the states of a module's torchmetrics back afterwards, unless an exception ends the block."""
    states = metric_states(module)
    yield
    load_metric_states(module, states)


@contextmanager
def keep_metrics_local(module: torch.nn.Module, world_size: int) -> Iterator[None]:
    """Keep torchmetrics from reducing over the process group, where each rank of it runs ``module`` by itself.

    Args:
        module: holds the metrics.
        world_size: the ranks of the run: 1 where each rank runs by itself.
    """
    is_alone = (
        world_size == 1
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )
    metrics = list(_metrics_of(module).values()) if is_alone else []
    before = [metric.distributed_available_fn for metric in metrics]
    for metric in metrics:
        metric.distributed_available_fn = _is_never_distributed
    try:
        yield
    finally:
        for metric, is_distributed in zip(metrics, before, strict=True):
            metric.distributed_available_fn = is_distributed


def _is_never_distributed() -> bool:
    return False


def list_states(metric: Any) -> dict[tuple[str, str], Any]:
    """The states that are lists, of a ``Metric`` and those inside it: length, an element's dtype and shape."""
    states = {}
    for path, part in _metrics_of(metric).items():
        for name, value in part.metric_state.items():
            if not isinstance(value, list):
                continue
            first = [(item.dtype, tuple(item.shape)) for item in value[:1]]
            states[path, name] = len(value), first
    return states


def fill_list_states(metric: Any, by_rank: list[dict[tuple[str, str], Any]]) -> None:
    """Put an empty tensor into each list that is empty on this rank but not on all.

    torchmetrics concatenates the lists over ranks, and needs a tensor of the same type and dimensions from each.

    Args:
        metric: the logged metric.
        by_rank: what :func:`list_states` says on each rank.

    Raises:
        RuntimeError: if a list is gathered element by element, and has other lengths on other ranks.
    """
    parts = _metrics_of(metric)
    for path, name in list_states(metric):
        part = parts[path]
        states = [own[path, name] for own in by_rank]
        lengths = [length for length, _ in states]
        if _reduction_of(part, name) == "dim_zero_cat":
            elements = [element for _, first in states for element in first]
            if elements and not part.metric_state[name]:
                dtype, shape = elements[0]
                nothing = torch.empty((0, *shape[1:]), dtype=dtype, device=part.device)
                part.metric_state[name].append(nothing)
        elif len(set(lengths)) > 1:
            raise RuntimeError(
                f"{type(part).__name__} keeps a list {name!r} that torchmetrics gathers element by element, and its "
                f"lengths by rank are {lengths}; they must be equal"
            )


def _reduction_of(metric: Any, name: str) -> str:
    """The name of the function by which torchmetrics reduces a state over ranks; "" if there is none."""
    return getattr(metric._reductions[name], "__name__", "")


def metric_states(module: torch.nn.Module) -> State:
    """Copies of the states of a module's torchmetrics, which ``state_dict`` leaves out, by the metrics' names."""
    # Copies, as a metric adds to its tensors in place, and its reset clears its lists in place.
    states = {}
    for name, metric in _metrics_of(module).items():
        state = {key: _copy_state(value) for key, value in metric.metric_state.items()}
        states[name] = {"update_count": metric._update_count, "state": state}
    return states


def _copy_state(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy_state(item) for item in value]
    return value.detach().clone()


def load_metric_states(module: torch.nn.Module, states: State) -> None:
    """Take back :func:`metric_states`."""
    for name, metric in _metrics_of(module).items():
        if name not in states:
            continue
        metric._update_count = states[name]["update_count"]
        metric._computed = None
        to_device = methodcaller("to", metric.device)
        for key, value in states[name]["state"].items():
            setattr(metric, key, map_tensors(value, to_device))


def merge_metric_states(
    module: torch.nn.Module, states: list[State], keep: bool
) -> State:
    """Join what :func:`metric_states` gave on several ranks into one, each state reduced as torchmetrics would.

    Args:
        module: holds the metrics.
        states: by rank.
        keep: False gives the states of metrics without values, for a rank beside the one that gets the values.

    Raises:
        CheckpointError: for a state that torchmetrics does not reduce by sum, minimum, maximum or concatenation.
    """
    merged = {}
    for name, metric in _metrics_of(module).items():
        by_rank = [state[name] for state in states if name in state]
        updated = [state for state in by_rank if state["update_count"]]
        if not updated:
            continue
        values = {}
        for key, default in metric._defaults.items():
            if keep:
                values[key] = _merge(
                    metric,
                    key,
                    [state["state"][key] for state in updated],
                )
            else:
                values[key] = copy.deepcopy(default)
        count = sum(state["update_count"] for state in updated)
        merged[name] = {"update_count": count, "state": values}
    return merged


def _merge(
    metric: Any,
    key: str,
    values: list[Any],
) -> Any:
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    reduction = _reduction_of(metric, key)
    if reduction == "dim_zero_cat":
        return torch.cat(values)
    if reduction in _MERGES:
        return _MERGES[reduction](torch.stack(values), 0)
    raise CheckpointError(
        f"the checkpoint was saved inside an epoch, and {type(metric).__name__} keeps a state {key!r} that cannot be "
        "joined over processes: resume with as many processes as saved it, or from an epoch's end"
    )
