"""Callbacks: what happens beside the loop. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from .device_stats_monitor import DeviceStatsMonitor
    from .early_stopping import EarlyStopping
    from .finetuning import BackboneFinetuning, BaseFinetuning
    from .garbage_collection import GarbageCollection
    from .gradient_accumulation_scheduler import GradientAccumulationScheduler
    from .lambda_callback import LambdaCallback
    from .lr_monitor import LearningRateMonitor
    from .model_checkpoint import ModelCheckpoint
    from .model_summary import ModelSummary, RichModelSummary
    from .on_exception_checkpoint import OnExceptionCheckpoint
    from .prediction_files import PredictionWriter
    from .prediction_writer import BasePredictionWriter
    from .profiler import PyTorchProfiler, SimpleProfiler
    from .progress import ProgressBar
    from .rich_progress import RichProgressBar, RichProgressBarTheme
    from .spike_detector import SpikeDetector, SpikeError
    from .throughput_monitor import ThroughputMonitor
    from .timer import Timer
    from .tqdm_progress import TQDMProgressBar

_MODULES = {
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "BasePredictionWriter": "prediction_writer",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EarlyStopping": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "GarbageCollection": "garbage_collection",
    "LambdaCallback": "lambda_callback",
    "LearningRateMonitor": "lr_monitor",
    # Not public: the Trainer makes one for its argument max_time.
    "MaxTime": "timer",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "PredictionWriter": "prediction_files",
    "ProgressBar": "progress",
    "PyTorchProfiler": "profiler",
    "RichModelSummary": "model_summary",
    "RichProgressBar": "rich_progress",
    "RichProgressBarTheme": "rich_progress",
    "SimpleProfiler": "profiler",
    "SpikeDetector": "spike_detector",
    "SpikeError": "spike_detector",
    "ThroughputMonitor": "throughput_monitor",
    "TQDMProgressBar": "tqdm_progress",
    "Timer": "timer",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "Callback",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "GarbageCollection",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "PredictionWriter",
    "ProgressBar",
    "PyTorchProfiler",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SimpleProfiler",
    "SpikeDetector",
    "SpikeError",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
