"""Lightning's callbacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ....callbacks import BackboneFinetuning as NativeBackboneFinetuning
from ....callbacks import BaseFinetuning as NativeBaseFinetuning
from ....callbacks import BasePredictionWriter as NativeBasePredictionWriter
from ....callbacks import BatchSizeFinder as NativeBatchSizeFinder
from ....callbacks import (
    Callback,
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
from ....callbacks import DeviceStatsMonitor as NativeDeviceStatsMonitor
from ....callbacks import LearningRateFinder as NativeLearningRateFinder
from ....callbacks import ModelCheckpoint as NativeModelCheckpoint
from ....callbacks import ModelPruning as NativeModelPruning
from ....callbacks import ModelSummary as NativeModelSummary
from ....callbacks import RichModelSummary as NativeRichModelSummary
from ....callbacks.prediction_writer import WriteInterval
from ....callbacks.tqdm_progress import Tqdm
from ..imports import unserved
from .files import yaml_of
from .spike import SpikeDetection
from .states import LightningEnum
from .utilities import (
    MisconfigurationException,
    get_filesystem,
    misconfigured_values,
    rank_zero_warn,
)
from .weight_averaging import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
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


@contextmanager
def _misconfigured() -> Iterator[None]:
    """Raise what Lightning's programs expect of arguments that do not fit."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise MisconfigurationException(str(error)) from None


class BasePredictionWriter(NativeBasePredictionWriter):
    """A :class:`~loopwright.callbacks.BasePredictionWriter`."""

    def __init__(self, write_interval: str = "batch") -> None:
        with _misconfigured():
            super().__init__(write_interval)


class DeviceStatsMonitor(NativeDeviceStatsMonitor):
    """A :class:`~loopwright.callbacks.DeviceStatsMonitor`."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with _misconfigured():
            super().setup(trainer, pl_module, stage)


class ModelPruning(NativeModelPruning):
    """A :class:`~loopwright.callbacks.ModelPruning`, with the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _misconfigured():
            super().__init__(*args, **kwargs)

    @staticmethod
    def sanitize_parameters_to_prune(*args: Any, **kwargs: Any) -> Any:
        with _misconfigured():
            return NativeModelPruning.sanitize_parameters_to_prune(*args, **kwargs)


class BaseFinetuning(NativeBaseFinetuning):
    """A :class:`~loopwright.callbacks.BaseFinetuning` whose groups can be read under Lightning's name for them."""

    @property
    def _internal_optimizer_metadata(self) -> dict[int, list[dict[str, Any]]]:
        return self.param_groups


class BackboneFinetuning(NativeBackboneFinetuning, BaseFinetuning):
    """A :class:`~loopwright.callbacks.BackboneFinetuning`."""

    def freeze_before_training(self, pl_module: Any) -> None:
        with _misconfigured():
            super().freeze_before_training(pl_module)


class LearningRateFinder(NativeLearningRateFinder):
    """A :class:`~loopwright.callbacks.LearningRateFinder`."""

    SUPPORTED_MODES = ("linear", "exponential")

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        _require_mode(self, mode)
        super().__init__(
            min_lr,
            max_lr,
            num_training_steps,
            mode,
            early_stop_threshold,
            update_attr,
            attr_name,
        )

    def lr_find(self, trainer: Any, pl_module: Any) -> Any:
        with misconfigured_values():
            return super().lr_find(trainer, pl_module)


def _require_mode(finder: Any, mode: str) -> None:
    if mode.lower() not in finder.SUPPORTED_MODES:
        raise ValueError(
            f"`mode` should be either of {finder.SUPPORTED_MODES}; got {mode!r}"
        )


class BatchSizeFinder(NativeBatchSizeFinder):
    """A :class:`~loopwright.callbacks.BatchSizeFinder`."""

    SUPPORTED_MODES = ("power", "binsearch")

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        _require_mode(self, mode)
        super().__init__(
            mode,
            steps_per_trial,
            init_val,
            max_trials,
            batch_arg_name,
            margin,
            max_val,
        )

    def scale_batch_size(self, trainer: Any, pl_module: Any) -> int | None:
        name = self.batch_arg_name
        if hasattr(pl_module, name) and name in pl_module.hparams:
            rank_zero_warn(
                f"Field `model.{name}` and `model.hparams.{name}` are mutually exclusive! Both are set."
            )
        with misconfigured_values():
            return super().scale_batch_size(trainer, pl_module)


CustomProgress = unserved(
    "CustomProgress", "override RichProgressBar.configure_columns"
)
MetricsTextColumn = unserved(
    "MetricsTextColumn", "override RichProgressBar.configure_columns"
)
