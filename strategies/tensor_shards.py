"""Shards of tensors, as checkpoints keep them: the part that one process has of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .stored_tensors import Offset, StoredTensor

if TYPE_CHECKING:
    from .base import Strategy


# Tensors, each with one to be copied into it.
TensorPairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TensorShard:
    """What this process has of a sharded tensor.

    Attributes:
        tensor: the numbers.
        shape: that of the whole tensor.
        offset: where the shard begins in it: an index in each dimension; or one index in the flattened tensor, of which
            the shard is a range.
        is_owner: whether this process is the one to save it, if several have it.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: Offset
    is_owner: bool = True

    def load(self, whole: Tensor | StoredTensor) -> None:
        """Take the numbers of another tensor of the whole's shape."""
        if isinstance(whole, StoredTensor):
            whole.read(self.tensor, self.offset)
        else:
            self.tensor.copy_(self.slice_of(whole))

    def slice_of(self, whole: Tensor | StoredTensor) -> Tensor:
        """Return the same part of another tensor of the whole's shape: a view, or read from files."""
        if isinstance(whole, StoredTensor):
            return whole.part(self.tensor.shape, self.offset)
        if isinstance(self.offset, int):
            end = self.offset + self.tensor.numel()
            return whole.reshape(-1)[self.offset : end]
        sizes = zip(self.offset, self.tensor.shape, strict=True)
        return whole[tuple(slice(start, start + size) for start, size in sizes)]


def full_state(strategy: Strategy, state: Any) -> Any:
    """Return nested state with the whole tensor, on the CPU, for each :class:`TensorShard`. A collective for each."""
    if isinstance(state, dict):
        return {key: full_state(strategy, value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(strategy, value) for value in state]
    if not isinstance(state, TensorShard):
        return state
    whole = torch.zeros(state.shape, dtype=state.tensor.dtype)
    if state.is_owner:
        state.slice_of(whole).copy_(state.tensor)
    return strategy.reduce(whole, "sum")
