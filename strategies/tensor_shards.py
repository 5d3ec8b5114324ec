"""Parts of tensors that are spread over processes, as checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Strategy


@dataclass(frozen=True)
class TensorShard:
    """What this process has of a tensor.

    Attributes:
        tensor: the numbers.
        shape: that of the whole.
        offset: where they begin in it: an index in each dimension; or one index in the whole laid out in one dimension.
        is_owner: whether this process is the one to save them, if several have them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...] | int
    is_owner: bool = True

    def slice_of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of this shape."""
        return slice_like(whole, self.tensor, self.offset)


def slice_like(whole: Tensor, like: Tensor, offset: Any) -> Tensor:
    """The part of ``whole`` that begins at ``offset`` and has the shape of ``like``: a view."""
    if isinstance(offset, int):
        return whole.reshape(-1)[offset : offset + like.numel()]
    return whole[
        tuple(
            slice(start, start + size)
            for start, size in zip(offset, like.shape, strict=True)
        )
    ]


def full_state(strategy: Strategy, state: Any) -> Any:
    """Nested state with the whole tensor, on the CPU, for each :class:`TensorShard`. A collective for each."""
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
