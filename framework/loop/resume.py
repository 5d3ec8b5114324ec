"""What a run goes on from: a checkpoint, an epoch that was left, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..metrics.metric_state import load_metric_states
from ..seed import set_rng_state

if TYPE_CHECKING:
    from .run import Run


class NoResume:
    """A fresh run, which goes on from nothing: each method says when it is called, and what subclasses apply then.

    They stand in the order in which they are called.

    Attributes:
        is_from_checkpoint: whether the run goes on from a checkpoint.
        cursor: how far all ranks have come in the running epoch's data, until that is applied.
    """

    is_from_checkpoint = False
    cursor: Any = None

    def apply_counters(self) -> None:
        """Counters, seed and loggers: before anybody asks for a folder, or for the order of the data."""

    def apply_weights(self) -> None:
        """Weights, data and callbacks: once the strategy has set up the module."""

    def apply_optimizers(self) -> None:
        """Optimizers and schedulers: after ``on_fit_start``, in which a callback may add parameter groups."""

    def apply_position(self) -> None:
        """The position in the data: once the training loader is made."""

    def apply_rng_and_metrics(self) -> None:
        """Random generators and metrics: before the first batch, once nothing else draws random numbers."""


class ResumeEpoch(NoResume):
    """Goes on inside the epoch in which the last fit of this Trainer has stopped.

    Args:
        run: the run.
        gathered: what that fit had gathered of the epoch; see ``Run.gathered``.
    """

    def __init__(self, run: Run, gathered: dict[str, Any] | None) -> None:
        self.run = run
        self._gathered = gathered

    @property
    def cursor(self) -> Any:
        """How far all ranks have come in the running epoch's data, until that is applied."""
        return None if self._gathered is None else self._gathered["loader"]["cursor"]

    def apply_position(self) -> None:
        """Put the training loader where the epoch was left."""
        if self._gathered is not None and self.run.loaders.train is not None:
            self.run.loaders.restore_train(self._gathered)

    def apply_rng_and_metrics(self) -> None:
        """Set logged values, torchmetrics and random generators; further calls do nothing."""
        gathered = self._gathered
        self._gathered = None
        if gathered is None:
            return
        self.run.metrics.load_state_dict(gathered["logged"]["metrics"])
        load_metric_states(self.run.module, gathered["logged"]["metric_states"])
        rng = gathered.get("rng")
        if rng is not None:
            set_rng_state(rng, self.run.engine.device)
