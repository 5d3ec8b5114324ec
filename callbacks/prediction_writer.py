"""Write predictions: the base of callbacks that do it in a way of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import require_choice
from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class WriteInterval(str, Enum):
    """When a :class:`BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    __str__ = str.__str__

    @property
    def on_batch(self) -> bool:
        """Whether it writes after each batch."""
        return self in (WriteInterval.BATCH, WriteInterval.BATCH_AND_EPOCH)

    @property
    def on_epoch(self) -> bool:
        """Whether it writes at the end."""
        return self in (WriteInterval.EPOCH, WriteInterval.BATCH_AND_EPOCH)


class BasePredictionWriter(Callback):
    """The base of callbacks that write predictions; override the method that ``write_interval`` asks for.

    Each process writes its own predictions. Run with ``trainer.predict(..., return_predictions=False)``, so that the
    Trainer does not keep them, too. :class:`~.prediction_files.PredictionWriter` is one that is ready.

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Attributes:
        interval: the same, as a :class:`WriteInterval`.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        intervals = [str(interval) for interval in WriteInterval]
        require_choice("write_interval", write_interval, *intervals)
        self.interval = WriteInterval(write_interval)
        # By loader, what is kept for the end.
        self._predictions: list[list[Any]] = []
        self._indices: list[list[Any]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the predictions of a batch.

        Args:
            trainer: the Trainer.
            pl_module: what has predicted.
            prediction: what ``predict_step`` returned.
            batch_indices: the samples' indices in the dataset; None where the loader does not tell, such as a stream.
            batch: the batch.
            batch_idx: its index in this process.
            dataloader_idx: index of its loader.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override write_on_batch_end"
        )

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all predictions of this process.

        Args:
            trainer: the Trainer.
            pl_module: what has predicted.
            predictions: what ``predict_step`` returned, by batch, its tensors on the CPU; with several loaders, a list
                of such lists.
            batch_indices: for each loader, the samples' indices by batch, as in :meth:`write_on_batch_end`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override write_on_epoch_end"
        )

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        loaders = trainer.num_predict_batches
        self._predictions = [[] for _ in loaders]
        self._indices = [[] for _ in loaders]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        indices = trainer.predict_batch_indices
        if self.interval.on_epoch:
            # A host–device sync: predictions that stayed on the device would fill it.
            self._predictions[dataloader_idx].append(on_cpu(outputs))
            self._indices[dataloader_idx].append(indices)
        if self.interval.on_batch:
            self.write_on_batch_end(
                trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx
            )

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self.interval.on_epoch:
            return
        predictions: Any = self._predictions
        if len(predictions) == 1:
            predictions = predictions[0]
        self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)
        self._predictions = []
        self._indices = []


def on_cpu(value: Any) -> Any:
    """The same dicts, lists and tuples, with their tensors on the CPU and without graphs."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [on_cpu(item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return value
