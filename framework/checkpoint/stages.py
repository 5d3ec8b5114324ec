"""What a Trainer is doing, in words that are equal to their texts and print as these."""

from __future__ import annotations

from enum import Enum


class _Word(str, Enum):
    __str__ = str.__str__


class TrainerFn(_Word):
    """What was asked of a Trainer."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(_Word):
    """Which loop of it runs."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether it is a validation or a test."""
        return self in ("validate", "sanity_check", "test")


class TrainerStatus(_Word):
    """How far it is with that."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether the run has ended."""
        return self not in ("initializing", "running")
