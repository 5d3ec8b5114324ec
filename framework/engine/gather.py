"""``Engine.gather_for_metrics``: the results of a step, gathered from all processes whatever their structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.batches import LISTS, batch_size_of, children, leaves, rebuild
from . import tensor_collectives

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from .loaders import PreparedLoader


class Results:
    """A step's results in all processes: tensors joined along the first dimension, lists by their items, both by rank.

    Tuples, dataclasses and dicts keep their structure, on which the processes agree first. That takes one small
    collective; all that is pickled takes another, and each tensor one or two.

    Args:
        strategy: the strategy.
        loader: the prepared loader that is being iterated, if there is one.
    """

    def __init__(self, strategy: Strategy, loader: PreparedLoader | None) -> None:
        self.strategy = strategy
        self.loader = loader
        # Whether this process's results count: those of a dummy batch are left out.
        self.counts = loader is None or loader.batch_weight != 0.0

    def gather(self, data: Any) -> Any:
        """The results of all processes.

        Raises:
            RuntimeError: if the processes have different structures.
        """
        if isinstance(data, Tensor):
            return tensor_collectives.concatenate_uneven(
                self.strategy, data, self.counts
            )
        parts: list[Any] = []
        _for_each(data, parts.append)
        is_mixed = _is_mixed(data, parts)
        kinds = [self._kind(part) for part in parts]
        by_rank = self.strategy.gather_objects(
            (self.counts, is_mixed, kinds, _outline(data)),
        )
        counting = [result for result in by_rank if result[0]]
        if any(is_mixed for _, is_mixed, _, _ in counting):
            return self.gather_objects(data)
        tensor_collectives.require_alike([outline for *_, outline in by_rank])
        kinds_by_part = zip(*(kinds for _, _, kinds, _ in counting), strict=True)
        are_columns = [_are_columns(kinds) for kinds in kinds_by_part]
        return self._gather_parts(data, parts, are_columns)

    def gather_objects(self, data: Any) -> list[Any]:
        """The results as objects: lists and tuples are joined, anything else is an item."""
        return tensor_collectives.join(self._exchange(data))

    def _exchange(self, value: Any) -> list[Any]:
        """The values of all processes whose results count."""
        by_rank = tensor_collectives.exchange(self.strategy, (self.counts, value))
        return [value for counts, value in by_rank if counts]

    def _gather_parts(
        self,
        data: Any,
        parts: list[Any],
        are_columns: list[bool],
    ) -> Any:
        pickled = [
            part
            for part, columns in zip(parts, are_columns, strict=True)
            if not (columns or part is None or isinstance(part, Tensor))
        ]
        by_rank = self._exchange(pickled) if pickled else []
        objects = zip(*by_rank, strict=True)
        columns = iter(are_columns)

        def gather_part(part: Any) -> Any:
            if next(columns):
                return rebuild(part, self.gather)
            if part is None:
                return None
            if isinstance(part, Tensor):
                return self.gather(part)
            return tensor_collectives.join(list(next(objects)))

        return _for_each(data, gather_part)

    def _kind(self, part: Any) -> tuple[str, int]:
        """What a list holds, and its length.

        ``"columns"``: the batch's, as loaders make them: tensors that have a row for each sample. ``"samples"``: an
        item for each sample. ``"either"``: all of its tensors have as many rows as the batch, but those rows may be
        something else, such as the channels of images. They are samples if they are as many as the loader's
        ``batch_size``.
        """
        loader = self.loader
        if loader is None or not isinstance(part, (tuple, *LISTS)) or not part:
            return "samples", 0
        with suppress(ValueError):
            rows = batch_size_of(loader.batch)
            is_batch = part is loader.batch
            if is_batch or all(
                isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)
                for leaf in leaves(part)
            ):
                certain = rows == getattr(loader, "batch_size", None) and (
                    is_batch or len(part) != rows
                )
                return "columns" if certain else "either", len(part)
        return "samples", len(part)


def _are_columns(kinds: tuple[tuple[str, int], ...]) -> bool:
    """Whether what the processes hold of a list are columns: all of them may be, and one of them is."""
    names = {kind for kind, _ in kinds}
    if names == {"either"} and len(kinds) > 1 and kinds[0][1] > 1:
        warnings.warn(
            f"gather_for_metrics: a list of {kinds[0][1]}, which may be the batch's columns, is taken for one of "
            "samples: pass columns as a dict",
            stacklevel=6,
        )
    return (
        "columns" in names
        and "samples" not in names
        and len({length for _, length in kinds}) == 1
    )


def _keeps_structure(data: Any) -> bool:
    """Whether each value of a container is a result by itself, as in dicts, dataclasses and tuples of tensors.

    Lists hold samples; so do tuples of texts, and tuples of dicts with equal keys.
    """
    values = children(data)
    if values is None or isinstance(data, LISTS):
        return False
    if not isinstance(data, tuple) or hasattr(data, "_fields"):
        return True
    are_mappings = all(isinstance(value, Mapping) for value in data)
    if are_mappings and len({frozenset(value.keys()) for value in data}) <= 1:
        return False
    return any(
        isinstance(value, Tensor) or children(value) is not None for value in data
    )


def _for_each(data: Any, function: Callable[[Any], Any]) -> Any:
    """Copy containers that keep their structure, with ``function`` applied to each result in them."""
    if _keeps_structure(data):
        return tensor_collectives.rebuild_in_key_order(
            data, partial(_for_each, function=function)
        )
    return function(data)


def _is_mixed(data: Any, parts: list[Any]) -> bool:
    """Whether a dict holds tensors beside other things, or what is neither tensor nor list.

    Such a dict is one result of its process.
    """
    if isinstance(data, tuple) or not _keeps_structure(data):
        return False
    only_tensors = all(
        leaf is None or isinstance(leaf, Tensor) for leaf in leaves(data)
    )
    return not only_tensors and not all(
        part is None or isinstance(part, (tuple, *LISTS)) for part in parts
    )


def _outline(data: Any) -> Any:
    """What must be equal in all processes of their results: structure, types and shapes."""
    if _keeps_structure(data):
        values = [_outline(value) for value in children(data) or ()]
        if isinstance(data, Mapping):
            return dict(zip(data.keys(), values, strict=True))
        return values
    if isinstance(data, Tensor):
        return tensor_collectives.outline(data)
    if isinstance(data, (tuple, *LISTS)):
        return "list"
    return "None" if data is None else "object"
