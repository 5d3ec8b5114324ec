"""Lightning's callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ....callbacks import BackboneFinetuning as NativeBackboneFinetuning
from ....callbacks import BaseFinetuning as NativeBaseFinetuning
from ....callbacks import BasePredictionWriter as NativeBasePredictionWriter
from ....callbacks import BatchSizeFinder as NativeBatchSizeFinder
from ....callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LambdaCallback,
    OnExceptionCheckpoint,
    ProgressBar,
    RichProgressBar,
    RichProgressBarTheme,
    ThroughputMonitor,
    TQDMProgressBar,
)
from ....callbacks import DeviceStatsMonitor as NativeDeviceStatsMonitor
from ....callbacks import LearningRateFinder as NativeLearningRateFinder
from ....callbacks import ModelPruning as NativeModelPruning
from ....callbacks import ModelSummary as NativeModelSummary
from ....callbacks import RichModelSummary as NativeRichModelSummary
from ....callbacks import Timer as NativeTimer
from ....callbacks.prediction_writer import WriteInterval
from ....callbacks.tqdm_progress import Tqdm
from ..imports import unserved
from .early_stopping import EarlyStopping, EarlyStoppingReason
from .lr_monitor import LearningRateMonitor
from .model_checkpoint import Checkpoint, ModelCheckpoint
from .spike import SpikeDetection
from .states import LightningEnum
from .utilities import (
    MisconfigurationException,
    MisconfiguredValue,
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
    "EarlyStoppingReason",
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


class Timer(NativeTimer):
    """A :class:`~loopwright.callbacks.Timer`, with the same arguments.

    Raises:
        MisconfigurationException: if ``interval`` is neither ``"step"`` nor ``"epoch"``.
    """

    def __init__(
        self, duration: Any = None, interval: str = "step", verbose: bool = True
    ) -> None:
        if interval not in set(Interval):
            raise MisconfiguredValue(
                f"Unsupported parameter value Timer(interval={interval!r}): it must be one of 'step' and 'epoch'"
            )
        super().__init__(duration, str(Interval(interval)), verbose)

    @property
    def _offset(self) -> float:
        return self._seconds_before_fit


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


def require_known_mode(modes: tuple[str, ...], mode: str) -> None:
    """Refuse a mode of a search that is not among those.

    Raises:
        ValueError: for another.
    """
    if mode.lower() not in modes:
        raise ValueError(f"`mode` should be either of {modes}; got {mode!r}")


def warn_of_two_fields(module: Any, name: str) -> None:
    """Warn of a batch size that a module has twice: beside its hyperparameters."""
    if hasattr(module, name) and name in module.hparams:
        rank_zero_warn(
            f"Field `model.{name}` and `model.hparams.{name}` are mutually exclusive! Both are set."
        )


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
        require_known_mode(self.SUPPORTED_MODES, mode)
        super().__init__(
            min_lr,
            max_lr,
            num_training_steps,
            mode,
            early_stop_threshold,
            update_attr,
            attr_name,
        )

    @property
    def _num_training_steps(self) -> int:
        return self.num_training_steps

    def lr_find(self, trainer: Any, pl_module: Any) -> Any:
        with misconfigured_values():
            return super().lr_find(trainer, pl_module)


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
        require_known_mode(self.SUPPORTED_MODES, mode)
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
        warn_of_two_fields(pl_module, self.batch_arg_name)
        with misconfigured_values():
            return super().scale_batch_size(trainer, pl_module)


CustomProgress = unserved(
    "CustomProgress", "override RichProgressBar.configure_columns"
)
MetricsTextColumn = unserved(
    "MetricsTextColumn", "override RichProgressBar.configure_columns"
)
