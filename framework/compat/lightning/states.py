"""Lightning's names for what a Trainer is doing."""

from __future__ import annotations

from enum import Enum

from ...checkpoint.schema import RunState as TrainerState
from ...checkpoint.stages import RunningStage, TrainerFn, TrainerStatus

__all__ = [
    "LightningEnum",
    "RunningStage",
    "TrainerFn",
    "TrainerState",
    "TrainerStatus",
]


class LightningEnum(str, Enum):
    """A text with a name; equal to its text, in any case."""

    __str__ = str.__str__

    @classmethod
    def from_str(cls, value: str, source: str = "key") -> LightningEnum | None:
        """Find a member by its name, its value, or either of them.

        Args:
            value: the name or value, in any case; ``-`` counts as ``_``.
            source: ``"key"``, ``"value"`` or ``"any"``.
        """
        wanted = value.lower().replace("-", "_")
        for member in cls:
            if source in ("key", "any") and member.name.lower() == wanted:
                return member
            is_value = member.value.lower().replace("-", "_") == wanted
            if source in ("value", "any") and is_value:
                return member
        return None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())
