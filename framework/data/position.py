"""Which part of an epoch's data the ranks of a run read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.schema import PartOfEpoch


@dataclass(frozen=True)
class Segment:
    """A part of an epoch's data; by default all of it.

    A run that resumes inside an epoch, with another number of ranks or another batch size, completes the epoch by a
    segment: what was left of the data, which is divided among the ranks anew. Positions count samples where the order
    of the samples is computed from the seed, else batches of the loader.

    Attributes:
        first_batch: how many batches of the epoch each rank had been given before the segment.
        begin: the position at which it begins.
        end: the position at which it ends; None is the epoch's end.
    """

    first_batch: int = 0
    begin: int = 0
    end: int | None = None

    @classmethod
    def from_state(cls, state: PartOfEpoch | None) -> Segment:
        """The segment that :meth:`state_dict` gave."""
        if state is None:
            return WHOLE_EPOCH
        return cls(state["first"], state["begin"], state["end"])

    def state_dict(self) -> PartOfEpoch | None:
        """What a checkpoint holds of it: ``first``, ``begin`` and ``end``, or None for a whole epoch."""
        if self == WHOLE_EPOCH:
            return None
        return {"first": self.first_batch, "begin": self.begin, "end": self.end}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Numbers to mix into the seeds of its batches, which are counted from 0, as those of the whole epoch are."""
        return (self.begin,) if self.begin else ()

    def length_of(self, batches: float) -> float:
        """How many of an epoch's ``batches`` lie in the segment, if positions count batches."""
        end = batches if self.end is None else min(self.end, batches)
        return max(0, end - self.begin)

    def slice(self, order: Sequence[Any]) -> Sequence[Any]:
        """The part of an epoch's ``order`` that lies in the segment."""
        return order if self == WHOLE_EPOCH else order[self.begin : self.end]


WHOLE_EPOCH = Segment()
