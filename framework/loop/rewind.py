"""Going back, inside a fit, to a checkpoint of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .resume import NoResume


class RewindPoint(NamedTuple):
    """A checkpoint that a fit can go back to.

    Attributes:
        position: the epoch and the index of the batch with which it goes on.
        is_own: whether this fit has saved it, so that its pickled objects may be loaded.
    """

    position: tuple[int, int]
    is_own: bool


class Rewind(Exception):
    """Ends a hook of a fit, and all between it and the loop: the run goes back to a checkpoint, and on from there.

    Args:
        resume: the checkpoint's state, to be applied.
        batches: the batches to leave out from there on, each by its epoch and its index.
    """

    def __init__(self, resume: NoResume, batches: Iterable[tuple[int, int]]) -> None:
        super().__init__("this is for the loop of fit: let it pass through hooks")
        self.resume = resume
        self.batches = list(batches)
