"""Lightning's callbacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.utils.prune import BasePruningMethod

from ....callbacks import BackboneFinetuning as NativeBackboneFinetuning
from ....callbacks import BaseFinetuning as NativeBaseFinetuning
from ....callbacks import BasePredictionWriter as NativeBasePredictionWriter
from ....callbacks import BatchSizeFinder as NativeBatchSizeFinder
from ....callbacks import (
    Callback,
    LambdaCallback,
    OnExceptionCheckpoint,
)
from ....callbacks import DeviceStatsMonitor as NativeDeviceStatsMonitor
from ....callbacks import (
    GradientAccumulationScheduler as NativeGradientAccumulationScheduler,
)
from ....callbacks import LearningRateFinder as NativeLearningRateFinder
from ....callbacks import ModelPruning as NativeModelPruning
from ....callbacks import ModelSummary as NativeModelSummary
from ....callbacks import RichModelSummary as NativeRichModelSummary
from ....callbacks import Timer as NativeTimer
from ....callbacks.prediction_writer import WriteInterval
from ....callbacks.timer import MaxTime as NativeMaxTime
from .early_stopping import EarlyStopping, EarlyStoppingReason
from .lr_monitor import LearningRateMonitor
from .model_checkpoint import Checkpoint, ModelCheckpoint
from .progress_bars import (
    ProgressBar,
    RichProgressBar,
    RichProgressBarTheme,
    TQDMProgressBar,
)
from .rich_bars import CustomProgress, MetricsTextColumn
from .spike import SpikeDetection
from .states import LightningEnum
from .throughput_monitor import ThroughputMonitor
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
    "WeightAveraging",
    "WriteInterval",
]

log = logging.getLogger("loopwright")


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


class MaxTime(Timer, NativeMaxTime):
    """The Timer of ``Trainer(max_time=…)``, which programs look for as a :class:`Timer`."""


class ModelSummary(NativeModelSummary):
    """A :class:`~loopwright.callbacks.ModelSummary`.

    Args:
        max_depth: how deep to go into nested layers.
        **summarize_kwargs: what :meth:`summarize` is given, if a subclass overrides it.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        super().__init__(max_depth)
        self._summarize_kwargs = summarize_kwargs
        self._modes: dict[str, int] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parts = [part for part in pl_module.modules() if part is not pl_module]
        trained = sum(part.training for part in parts)
        self._modes = {"train": trained, "eval": len(parts) - trained}
        super().on_fit_start(trainer, pl_module)

    def show(self, summary: Any) -> None:
        """Print the summary: as :meth:`summarize` does where a subclass has its own."""
        if self.summarize is ModelSummary.summarize:
            super().show(summary)
            return
        columns = [
            [row[i] for row in summary.rows] for i in range(len(summary.columns))
        ]
        self.summarize(
            summary_data=[
                (" ", [str(number) for number in range(len(summary.rows))]),
                *zip(summary.columns, columns, strict=True),
            ],
            total_parameters=summary.total_parameters,
            trainable_parameters=summary.trainable_parameters,
            model_size=summary.model_size,
            total_training_modes=self._modes,
            total_flops=0,
            **self._summarize_kwargs,
        )

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int = 0,
        **summarize_kwargs: Any,
    ) -> None:
        """Override it to show a summary in another way.

        Args:
            summary_data: the columns of the table: headings, and texts by layer.
            total_parameters: numbers in all parameters.
            trainable_parameters: numbers in those that are trained.
            model_size: of the parameters, in megabytes.
            total_training_modes: how many submodules are in the modes ``"train"`` and ``"eval"``.
            total_flops: 0, as operations are not counted.
            **summarize_kwargs: as the constructor was given them.
        """


class RichModelSummary(NativeRichModelSummary, ModelSummary):
    """A :class:`~loopwright.callbacks.RichModelSummary`.

    Args:
        max_depth: how deep to go into nested layers.
        **summarize_kwargs: ``header_style`` is rich's style of the headings; others are not used.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        style = summarize_kwargs.get("header_style", "bold magenta")
        ModelSummary.__init__(self, max_depth, **summarize_kwargs)
        self._header_style = style

    def show(self, summary: Any) -> None:
        """Draw the summary, or show it as :meth:`summarize` does where a subclass has its own."""
        if self.summarize is ModelSummary.summarize:
            NativeRichModelSummary.show(self, summary)
        else:
            ModelSummary.show(self, summary)


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
        intervals = [str(interval) for interval in WriteInterval]
        if write_interval not in intervals:
            raise MisconfigurationException(
                f"`write_interval` should be one of {intervals}; got {write_interval!r}"
            )
        super().__init__(write_interval)


class GradientAccumulationScheduler(NativeGradientAccumulationScheduler):
    """A :class:`~loopwright.callbacks.GradientAccumulationScheduler`.

    Raises:
        TypeError: if ``scheduling`` is empty.
        MisconfigurationException: if it holds other than epochs and numbers of batches.
        RuntimeError: when a training begins, with manual optimization.
    """

    def __init__(self, scheduling: Any) -> None:
        if not scheduling:
            raise TypeError("Empty dict cannot be interpreted correct")
        with misconfigured_values():
            super().__init__(scheduling)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "Automatic gradient accumulation and the `GradientAccumulationScheduler` is not supported for manual "
                "optimization: update(loss) of an optimizer accumulates"
            )


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
    def _is_pruning_method(method: Any) -> bool:
        return inspect.isclass(method) and issubclass(method, BasePruningMethod)

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
        # What the last trial has shown.
        self._tried = ""

    def _search(self, trainer: Any, module: Any) -> int:
        self._tried = ""
        return super()._search(trainer, module)

    def _try(self, trainer: Any, module: Any, size: int) -> float | None:
        if self._tried:
            log.info("%s, trying batch size %d", self._tried, size)
        samples = super()._try(trainer, module, size)
        outcome = "failed" if samples is None else "succeeded"
        self._tried = f"Batch size {size} {outcome}"
        if samples is not None and size >= samples:
            log.info(
                "The batch size %d is greater or equal than the length of your dataset.",
                size,
            )
        return samples

    def scale_batch_size(self, trainer: Any, pl_module: Any) -> int | None:
        warn_of_two_fields(pl_module, self.batch_arg_name)
        with misconfigured_values():
            return super().scale_batch_size(trainer, pl_module)
