"""Lightning's functions about loaders and batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset

from ...data.batches import leaves
from .utilities import (
    MisconfigurationException,
    WarningCache,
    rank_zero_warn,
    suggested_max_num_workers,
)

__all__ = [
    "_tree_flatten",
    "extract_batch_size",
    "has_iterable_dataset",
    "has_len",
    "has_len_all_ranks",
    "sized_len",
    "suggested_max_num_workers",
    "tree_flatten",
    "tree_unflatten",
    "warning_cache",
]

warning_cache = WarningCache()
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten


def _sizes_in(batch: Any) -> Iterator[int]:
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf.shape[0] if leaf.ndim else 1


def extract_batch_size(batch: Any) -> int:
    """The first dimension of the first of a batch's tensors; a warning says once if another one's differs.

    Raises:
        MisconfigurationException: if there is no tensor.
    """
    sizes = list(_sizes_in(batch))
    if not sizes:
        raise MisconfigurationException(
            "We could not infer the batch_size from the batch: pass batch_size=… to self.log"
        )
    if len(set(sizes)) > 1:
        warning_cache.warn(
            "Trying to infer the `batch_size` from an ambiguous collection. The batch size we found is "
            f"{sizes[0]}. To avoid any miscalculations, use `self.log(..., batch_size=batch_size)`."
        )
    return sizes[0]


def sized_len(dataloader: Any) -> int | None:
    """The length of a loader, or None if it has none."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether a loader's dataset is a stream."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def has_len(dataloader: Any) -> bool:
    """Whether a loader has a length; a warning says if that is zero."""
    length = sized_len(dataloader)
    if length == 0:
        rank_zero_warn(
            f"`{type(dataloader).__name__}` returned 0 length. Please make sure this was your intention."
        )
    return length is not None


def has_len_all_ranks(
    dataloader: Any,
    strategy: Any,
    allow_zero_length_dataloader_with_multiple_devices: bool = False,
) -> bool:
    """Whether a loader has a length in all processes.

    Args:
        dataloader: the loader.
        strategy: of the processes.
        allow_zero_length_dataloader_with_multiple_devices: whether that of one of them may be zero, if not of all.

    Raises:
        RuntimeError: if it is, and may not.
    """
    length = sized_len(dataloader)
    if length is None:
        return False
    lengths = [length]
    if strategy.world_size > 1:
        lengths = strategy.gather_objects(length)  # collective
    if not sum(lengths):
        rank_zero_warn(
            "Total length of `DataLoader` across ranks is zero. Please make sure this was your intention."
        )
    elif 0 in lengths and not allow_zero_length_dataloader_with_multiple_devices:
        raise RuntimeError(
            f"`{type(dataloader).__name__}` within local rank has zero length. Please make sure that it returns at "
            "least 1 batch."
        )
    return True


def _is_leaf(item: Any) -> bool:
    """Whether a part of a nesting of loaders is a loader: what is no collection, or one of numbers and texts."""
    if not isinstance(item, (list, tuple, dict)):
        return True
    parts = item.values() if isinstance(item, dict) else item
    return all(isinstance(part, (bool, int, float, str)) for part in parts)


def _tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """The loaders in a nesting, and how they are nested, for ``tree_unflatten``."""
    return pytree.tree_flatten(tree, is_leaf=_is_leaf)
