"""Callbacks: what happens beside the loop. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from .advanced_profiler import AdvancedProfiler
    from .batch_size_finder import BatchSizeFinder
    from .device_stats_monitor import DeviceStatsMonitor
    from .early_stopping import EarlyStopping
    from .finetuning import BackboneFinetuning, BaseFinetuning
    from .garbage_collection import GarbageCollection
    from .gradient_accumulation_scheduler import GradientAccumulationScheduler
    from .lambda_callback import LambdaCallback
    from .lr_finder import LearningRateFinder
    from .lr_monitor import LearningRateMonitor
    from .memory_snapshot import MemorySnapshot
    from .model_checkpoint import ModelCheckpoint
    from .model_pruning import ModelPruning
    from .model_summary import ModelSummary, RichModelSummary
    from .notify import Notify
    from .on_exception_checkpoint import OnExceptionCheckpoint
    from .optuna_pruning import OptunaPruningCallback
    from .prediction_files import PredictionWriter
    from .prediction_writer import BasePredictionWriter
    from .profiler import Profiler
    from .progress import ProgressBar
    from .pytorch_profiler import PyTorchProfiler
    from .rich_progress import RichProgressBar, RichProgressBarTheme
    from .save_pretrained import SavePretrained
    from .simple_profiler import SimpleProfiler
    from .spike_detector import SpikeDetector, SpikeError
    from .stochastic_weight_averaging import StochasticWeightAveraging
    from .throughput_monitor import ThroughputMonitor
    from .timer import Timer
    from .tqdm_progress import TQDMProgressBar
    from .weight_averaging import EMAWeightAveraging, WeightAveraging

_MODULES = {
    "AdvancedProfiler": "advanced_profiler",
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "BasePredictionWriter": "prediction_writer",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EMAWeightAveraging": "weight_averaging",
    "BatchSizeFinder": "batch_size_finder",
    "EarlyStopping": "early_stopping",
    "GarbageCollection": "garbage_collection",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_callback",
    "LearningRateFinder": "lr_finder",
    "LearningRateMonitor": "lr_monitor",
    # Not public: the Trainer makes one for its argument max_time.
    "MaxTime": "timer",
    "MemorySnapshot": "memory_snapshot",
    "ModelCheckpoint": "model_checkpoint",
    "ModelPruning": "model_pruning",
    "ModelSummary": "model_summary",
    "Notify": "notify",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "OptunaPruningCallback": "optuna_pruning",
    "PredictionWriter": "prediction_files",
    "Profiler": "profiler",
    "ProgressBar": "progress",
    "PyTorchProfiler": "pytorch_profiler",
    "RichModelSummary": "model_summary",
    "RichProgressBar": "rich_progress",
    "RichProgressBarTheme": "rich_progress",
    "SavePretrained": "save_pretrained",
    "SimpleProfiler": "simple_profiler",
    "SpikeDetector": "spike_detector",
    "SpikeError": "spike_detector",
    "TQDMProgressBar": "tqdm_progress",
    "ThroughputMonitor": "throughput_monitor",
    "StochasticWeightAveraging": "stochastic_weight_averaging",
    "Timer": "timer",
    "WeightAveraging": "weight_averaging",
}

__all__ = [
    "AdvancedProfiler",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GarbageCollection",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "MemorySnapshot",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "Notify",
    "OnExceptionCheckpoint",
    "OptunaPruningCallback",
    "PredictionWriter",
    "Profiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SavePretrained",
    "SimpleProfiler",
    "SpikeDetector",
    "SpikeError",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
