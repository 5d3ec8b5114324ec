"""Parts of tensors that are spread over processes, as checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Strategy


@dataclass(frozen=True)
class Piece:
    """What this process has of a tensor.

    Attributes:
        tensor: the numbers.
        shape: that of the whole.
        offset: where they begin in it: an index in each dimension; or one index in the whole laid out in one dimension.
        mine: whether this process is the one to save them, if several have them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...] | int
    mine: bool = True

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of this shape."""
        return part_of(whole, self.tensor, self.offset)


def part_of(whole: Tensor, like: Tensor, offset: Any) -> Tensor:
    """The part of ``whole`` that begins at ``offset`` and has the shape of ``like``: a view."""
    if isinstance(offset, int):
        return whole.reshape(-1)[offset : offset + like.numel()]
    return whole[
        tuple(
            slice(start, start + size)
            for start, size in zip(offset, like.shape, strict=True)
        )
    ]


def whole_state(strategy: Strategy, state: Any) -> Any:
    """Nested state with the whole tensor, on the CPU, for each :class:`Piece`. A collective for each."""
    if isinstance(state, dict):
        return {key: whole_state(strategy, value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(strategy, value) for value in state]
    if not isinstance(state, Piece):
        return state
    whole = torch.zeros(state.shape, dtype=state.tensor.dtype)
    if state.mine:
        state.of(whole).copy_(state.tensor)
    return strategy.reduce(whole, "sum")
