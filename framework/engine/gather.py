"""What `gather_for_metrics` makes of a step's results in all processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.batches import LISTS, batch_size_of, children, leaves, rebuild
from . import peer_tensors

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from .loaders import PreparedLoader


class Results:
    """A step's results in all processes: tensors joined along the first dimension, lists by their items, both by rank.

    Tuples, dataclasses and dicts keep their structure, on which the processes agree first: one small collective for
    that, one for all that is pickled, and one or two for each tensor.

    Args:
        strategy: the strategy.
        loader: the prepared loader that is being iterated, if there is one.
    """

    def __init__(self, strategy: Strategy, loader: PreparedLoader | None) -> None:
        self.strategy, self.loader = strategy, loader
        self.present = loader is None or loader.share != 0.0

    def gather(self, data: Any) -> Any:
        """The results of all processes.

        Raises:
            RuntimeError: if the processes have different structures.
        """
        if isinstance(data, Tensor):
            return peer_tensors.concatenate_uneven(self.strategy, data, self.present)
        parts: list[Any] = []
        _for_each(data, parts.append)
        told = self.strategy.gather_objects(
            (
                self.present,
                _is_mixed(data, parts),
                [self._kind(part) for part in parts],
                _outline(data),
            )
        )
        counted = [each for each in told if each[0]]
        if any(mixed for _, mixed, _, _ in counted):
            return self.gather_objects(data)
        peer_tensors.require_alike([outline for *_, outline in told])
        are_columns = [
            _are_columns(kinds)
            for kinds in zip(*(kinds for _, _, kinds, _ in counted), strict=True)
        ]
        return self._gather_parts(data, parts, are_columns)

    def gather_objects(self, data: Any) -> list[Any]:
        """The results as objects: lists and tuples are joined, anything else is an item."""
        return peer_tensors.join(
            [
                value
                for there, value in peer_tensors.exchange(
                    self.strategy, (self.present, data)
                )
                if there
            ]
        )

    def _gather_parts(
        self, data: Any, parts: list[Any], are_columns: list[bool]
    ) -> Any:
        is_pickled = [
            not (columns or part is None or isinstance(part, Tensor))
            for part, columns in zip(parts, are_columns, strict=True)
        ]
        pickled = list(compress(parts, is_pickled))
        told = (
            peer_tensors.exchange(self.strategy, (self.present, pickled))
            if pickled
            else []
        )
        objects = iter(
            [
                peer_tensors.join(list(values))
                for values in zip(*(own for there, own in told if there), strict=True)
            ]
        )
        gathered = []
        for part, columns, as_object in zip(
            parts, are_columns, is_pickled, strict=True
        ):
            if as_object:
                gathered.append(next(objects))
            else:
                gathered.append(
                    rebuild(part, self.gather)
                    if columns
                    else part
                    if part is None
                    else self.gather(part)
                )
        results = iter(gathered)
        return _for_each(data, lambda part: next(results))

    def _kind(self, part: Any) -> tuple[str, int]:
        """What a list holds: "samples", or "columns" of the batch as loaders make them, or "either"; and its length.

        All its tensors have a row for each sample then. A batch's rows may be something else, such as the channels of
        images in a list; they are its samples if they are as many as the loader's ``batch_size``.
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
            stacklevel=5,
        )
    return (
        "columns" in names
        and "samples" not in names
        and len({length for _, length in kinds}) == 1
    )


def _keeps_structure(data: Any) -> bool:
    """Whether each value of a container is a result by itself; a tuple of texts, or of like dicts, holds samples."""
    values = children(data)
    if values is None or isinstance(data, LISTS):
        return False
    if not isinstance(data, tuple) or hasattr(data, "_fields"):
        return True
    if (
        all(isinstance(value, Mapping) for value in data)
        and len({frozenset(value.keys()) for value in data}) <= 1
    ):
        return False
    return any(
        isinstance(value, Tensor) or children(value) is not None for value in data
    )


def _for_each(data: Any, function: Callable[[Any], Any]) -> Any:
    """Copy what keeps its structure, with ``function`` applied to each result in it."""
    if _keeps_structure(data):
        return peer_tensors.rebuild_alike(data, partial(_for_each, function=function))
    return function(data)


def _is_mixed(data: Any, parts: list[Any]) -> bool:
    """Whether a dict holds neither tensors alone nor lists alone: it is one result of each process, then."""
    if isinstance(data, tuple) or not _keeps_structure(data):
        return False
    only_tensors = all(
        leaf is None or isinstance(leaf, Tensor) for leaf in leaves(data)
    )
    return not only_tensors and not all(
        part is None or isinstance(part, (tuple, *LISTS)) for part in parts
    )


def _outline(data: Any) -> Any:
    """What must be alike in all processes."""
    if _keeps_structure(data):
        values = [_outline(value) for value in children(data) or ()]
        return (
            dict(zip(data.keys(), values, strict=True))
            if isinstance(data, Mapping)
            else values
        )
    if isinstance(data, Tensor):
        return peer_tensors.outline(data)
    return (
        "list"
        if isinstance(data, (tuple, *LISTS))
        else "None"
        if data is None
        else "object"
    )
