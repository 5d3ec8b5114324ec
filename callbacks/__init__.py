"""Callbacks: what happens beside the loop. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from .early_stopping import EarlyStopping
    from .finetuning import BackboneFinetuning, BaseFinetuning
    from .gradient_accumulation_scheduler import GradientAccumulationScheduler
    from .lambda_callback import LambdaCallback
    from .lr_monitor import LearningRateMonitor
    from .model_checkpoint import ModelCheckpoint
    from .model_summary import ModelSummary
    from .on_exception_checkpoint import OnExceptionCheckpoint
    from .profiler import PyTorchProfiler, SimpleProfiler
    from .progress import ProgressBar
    from .rich_progress import RichProgressBar, RichProgressBarTheme
    from .timer import Timer

_MODULES = {
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "EarlyStopping": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_callback",
    "LearningRateMonitor": "lr_monitor",
    # Not public: the Trainer makes one for its argument max_time.
    "MaxTime": "timer",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "ProgressBar": "progress",
    "PyTorchProfiler": "profiler",
    "RichProgressBar": "rich_progress",
    "RichProgressBarTheme": "rich_progress",
    "SimpleProfiler": "profiler",
    "Timer": "timer",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "Callback",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "PyTorchProfiler",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SimpleProfiler",
    "Timer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
