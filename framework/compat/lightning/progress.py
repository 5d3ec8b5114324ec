"""How far a run has come, in the words of Lightning's loops: in their attributes, and in checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["EvaluationLoop", "data_states", "loop_states", "progress"]


def progress(count: int, total: int | None = None) -> Any:
    """Counters that are alike: of the epoch, and, where they differ, since the beginning.

    Args:
        count: the value of ``current.completed`` and its siblings.
        total: that of ``total.completed``; None for the same.
    """
    everything = count if total is None else total
    return SimpleNamespace(current=_counters(count), total=_counters(everything))


def _counters(number: int) -> Any:
    names = ("ready", "started", "processed", "completed")
    return SimpleNamespace(**dict.fromkeys(names, number))


class EvaluationLoop:
    """What programs read of Lightning's ``trainer.validate_loop``, ``trainer.test_loop`` and ``fit_loop.val_loop``.

    Args:
        trainer: which evaluates.
        stage: ``"val"`` or ``"test"``.
    """

    def __init__(self, trainer: Any, stage: str) -> None:
        self._trainer = trainer
        self._stage = stage

    @property
    def max_batches(self) -> list[int | float]:
        """Batches of each loader."""
        if self._trainer.sanity_checking:
            return self._trainer.num_sanity_val_batches
        return getattr(self._trainer, f"num_{self._stage}_batches")

    @property
    def num_dataloaders(self) -> int:
        """How many loaders are evaluated."""
        return len(self.max_batches)

    @property
    def batch_progress(self) -> Any:
        """The batch's index, as ``batch_progress.current.ready`` and its siblings."""
        return progress(self._trainer.batch_idx)

    @property
    def _data_source(self) -> Any:
        """Whether a fit has data to validate on."""
        return SimpleNamespace(is_defined=lambda: self._trainer.enable_validation)


def loop_states(trainer: Any) -> dict[str, Any]:
    """A run's counters as Lightning's checkpoints have them under ``loops``, for tools that read them.

    Args:
        trainer: whose checkpoint it is.
    """
    epoch = trainer.current_epoch
    batches = trainer.batch_idx
    steps = {"ready": trainer.global_step, "completed": trainer.global_step}
    optimizer = {
        "step": {"total": steps, "current": steps},
        "zero_grad": {
            "total": {**steps, "started": trainer.global_step},
            "current": {**steps, "started": trainer.global_step},
        },
    }
    of_epoch = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch + 1}
    is_last = batches >= trainer.num_training_batches
    fit = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": trainer.global_step},
        "epoch_loop.batch_progress": {
            "total": _counts(trainer.state.total_batches),
            "current": _counts(batches),
            "is_last_batch": is_last,
        },
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_progress": {
            "total": {**of_epoch, "completed": epoch},
            "current": {**of_epoch, "completed": epoch},
        },
    }
    return {
        "fit_loop": fit,
        "validate_loop": {"state_dict": {}},
        "test_loop": {"state_dict": {}},
        "predict_loop": {"state_dict": {}},
    }


def _counts(count: int) -> dict[str, int]:
    return {name: count for name in ("ready", "started", "processed", "completed")}


def data_states(trainer: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The state of a run's data under the name of its class, where tools look for it in Lightning's checkpoints."""
    state = checkpoint.get("datamodule")
    if state is None:
        return {}
    return {type(trainer.datamodule).__qualname__: state}
