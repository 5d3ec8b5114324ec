"""Lightning's callbacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.utils.data import SequentialSampler

from ....callbacks import BackboneFinetuning as NativeBackboneFinetuning
from ....callbacks import BaseFinetuning as NativeBaseFinetuning
from ....callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    OnExceptionCheckpoint,
    ProgressBar,
    RichProgressBar,
    RichProgressBarTheme,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from ....callbacks import ModelCheckpoint as NativeModelCheckpoint
from ....callbacks import ModelSummary as NativeModelSummary
from ....callbacks import RichModelSummary as NativeRichModelSummary
from ....callbacks.tqdm_progress import Tqdm
from ..imports import unserved
from .files import yaml_of
from .states import LightningEnum
from .utilities import (
    MisconfigurationException,
    get_filesystem,
    move_data_to_device,
)

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "CustomProgress",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "Interval",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "MetricsTextColumn",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "Tqdm",
    "WeightAveraging",
    "WriteInterval",
]


class Interval(LightningEnum):
    """After what a Timer looks at the clock."""

    step = "step"
    epoch = "epoch"


class Checkpoint(Callback):
    """The base of callbacks that save checkpoints. A Trainer that is given one makes no ModelCheckpoint of its own."""

    phase = "persist"


class ModelCheckpoint(NativeModelCheckpoint, Checkpoint):
    """A :class:`~loopwright.callbacks.ModelCheckpoint` that writes a checkpoint in one file.

    Args:
        *args: of :class:`~loopwright.callbacks.ModelCheckpoint`.
        save_on_exception: save a checkpoint when an exception ends the training.
        **kwargs: of :class:`~loopwright.callbacks.ModelCheckpoint`.
    """

    def __init__(
        self,
        dirpath: Any = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: Any = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor,
            verbose,
            save_last,
            save_top_k,
            save_weights_only,
            mode,
            auto_insert_metric_name,
            every_n_train_steps,
            train_time_interval,
            every_n_epochs,
            save_on_train_epoch_end,
            enable_version_counter,
            **kwargs,
        )
        self.save_on_exception = save_on_exception

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self.save_on_exception:
            self.save_now(trainer)

    def to_yaml(self, filepath: Any = None) -> None:
        """Write the paths of the best checkpoints, with their values.

        Args:
            filepath: the file. Default: ``best_k_models.yaml`` beside the checkpoints.
        """
        scores = {path: float(score) for path, score in self.best_k_models.items()}
        if filepath is None:
            filepath = os.path.join(self.dirpath or "", "best_k_models.yaml")
        with get_filesystem(filepath).open(str(filepath), "w") as file:
            file.write(yaml_of(scores))


class ModelSummary(NativeModelSummary):
    """A :class:`~loopwright.callbacks.ModelSummary`.

    Args:
        max_depth: how deep to go into nested layers.
        **summarize_kwargs: accepted for familiarity, and not used.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        super().__init__(max_depth)


class RichModelSummary(NativeRichModelSummary, ModelSummary):
    """A :class:`~loopwright.callbacks.RichModelSummary`.

    Args:
        max_depth: how deep to go into nested layers.
        **summarize_kwargs: ``header_style`` is rich's style of the headings; others are not used.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        style = summarize_kwargs.get("header_style", "bold magenta")
        NativeRichModelSummary.__init__(self, max_depth, style)


class WriteInterval(LightningEnum):
    """When a :class:`BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

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

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        self.interval = WriteInterval(write_interval)
        self._predictions: list[list[Any]] = []
        self._indices: list[list[Any]] = []

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
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
            batch_indices: the samples' indices in the dataset; None where they are not known: in several processes, and
                for a loader with a sampler of its own.
            batch: the batch.
            batch_idx: its index.
            dataloader_idx: index of its loader.
        """
        raise NotImplementedError

    def write_on_epoch_end(
        self,
        trainer: Any,
        pl_module: Any,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all predictions of this process.

        Args:
            trainer: the Trainer.
            pl_module: what has predicted.
            predictions: what ``predict_step`` returned, by batch; with several loaders, a list of such lists.
            batch_indices: for each loader, the samples' indices by batch, as in :meth:`write_on_batch_end`.
        """
        raise NotImplementedError

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        loaders = trainer.predict_dataloaders
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        self._predictions = [[] for _ in range(count)]
        self._indices = [[] for _ in range(count)]

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        indices = _batch_indices(trainer, batch_idx, dataloader_idx)
        if self.interval.on_epoch:
            self._predictions[dataloader_idx].append(
                move_data_to_device(outputs, "cpu")
            )
            self._indices[dataloader_idx].append(indices)
        if self.interval.on_batch:
            self.write_on_batch_end(
                trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx
            )

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.interval.on_epoch:
            return
        predictions: Any = self._predictions
        if len(predictions) == 1:
            predictions = predictions[0]
        self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)
        self._predictions = []
        self._indices = []


def _batch_indices(
    trainer: Any, batch_idx: int, dataloader_idx: int
) -> list[int] | None:
    """The indices of a batch's samples in the dataset, where the loader reads it in order."""
    loaders = trainer.predict_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    sampler = getattr(loader, "sampler", None)
    batch_size = getattr(loader, "batch_size", None)
    in_order = isinstance(sampler, SequentialSampler)
    if trainer.world_size > 1 or not in_order or batch_size is None:
        return None
    begin = batch_idx * batch_size
    return list(range(begin, min(begin + batch_size, len(loader.dataset))))


class BaseFinetuning(NativeBaseFinetuning):
    """A :class:`~loopwright.callbacks.BaseFinetuning` whose groups can be read under Lightning's name for them."""

    @property
    def _internal_optimizer_metadata(self) -> dict[int, list[dict[str, Any]]]:
        return self.param_groups


class BackboneFinetuning(NativeBackboneFinetuning, BaseFinetuning):
    """A :class:`~loopwright.callbacks.BackboneFinetuning`."""

    def freeze_before_training(self, pl_module: Any) -> None:
        try:
            super().freeze_before_training(pl_module)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None


_LATER = "it comes in a later version"
BatchSizeFinder = unserved(
    "BatchSizeFinder", 'Trainer(micro_batch="auto") divides a batch that does not fit'
)
CustomProgress = unserved(
    "CustomProgress", "override RichProgressBar.configure_columns"
)
EMAWeightAveraging = unserved("EMAWeightAveraging", _LATER)
LearningRateFinder = unserved("LearningRateFinder", _LATER)
MetricsTextColumn = unserved(
    "MetricsTextColumn", "override RichProgressBar.configure_columns"
)
ModelPruning = unserved("ModelPruning", "torch.nn.utils.prune in a callback of yours")
SpikeDetection = unserved("SpikeDetection", _LATER)
StochasticWeightAveraging = unserved(
    "StochasticWeightAveraging", "torch.optim.swa_utils in a callback of yours"
)
WeightAveraging = unserved(
    "WeightAveraging", "torch.optim.swa_utils in a callback of yours"
)
