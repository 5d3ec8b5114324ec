"""Lightning's names for what a Trainer is doing."""

from __future__ import annotations

from enum import Enum

from ...checkpoint.schema import RunState as TrainerState

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


class TrainerStatus(LightningEnum):
    """How a run stands."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    # By an exception, which Lightning does not tell from an interruption.
    FAILED = "failed"

    @property
    def stopped(self) -> bool:
        """Whether the run has ended."""
        ended = (
            TrainerStatus.FINISHED,
            TrainerStatus.INTERRUPTED,
            TrainerStatus.FAILED,
        )
        return self in ended


class TrainerFn(LightningEnum):
    """Which of the Trainer's methods runs."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(LightningEnum):
    """Which part of a run goes on."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether it is a validation or test."""
        return self in (
            RunningStage.VALIDATING,
            RunningStage.TESTING,
            RunningStage.SANITY_CHECKING,
        )

    @property
    def dataloader_prefix(self) -> str | None:
        """How the names of its loaders begin."""
        if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING):
            return "val"
        return self.value
