"""Loopwright, an opinionated trainer framework for PyTorch.

All public names of the four sub-packages can be imported from here. Each is imported when it is first used, so
`import loopwright` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import (
        AdvancedProfiler,
        BackboneFinetuning,
        BaseFinetuning,
        BasePredictionWriter,
        BatchSizeFinder,
        Callback,
        DeviceStatsMonitor,
        EarlyStopping,
        EMAWeightAveraging,
        GarbageCollection,
        GradientAccumulationScheduler,
        LambdaCallback,
        LearningRateFinder,
        LearningRateMonitor,
        MemorySnapshot,
        ModelCheckpoint,
        ModelPruning,
        ModelSummary,
        Notify,
        OnExceptionCheckpoint,
        OptunaPruningCallback,
        PredictionWriter,
        Profiler,
        ProgressBar,
        PyTorchProfiler,
        RichModelSummary,
        RichProgressBar,
        RichProgressBarTheme,
        SavePretrained,
        SimpleProfiler,
        SpikeDetector,
        SpikeError,
        StochasticWeightAveraging,
        ThroughputMonitor,
        Timer,
        TQDMProgressBar,
        WeightAveraging,
    )
    from .framework import (
        CheckpointError,
        CombinedLoader,
        DataModule,
        Engine,
        Module,
        Trainer,
        Tuner,
        cosine_schedule,
        find_executable_batch_size,
        generate,
        get_logger,
        isolated_rng,
        launch,
        linear_schedule,
        parameter_groups,
        seed_everything,
        wsd_schedule,
    )
    from .loggers import (
        CometLogger,
        CSVLogger,
        JSONLinesLogger,
        Logger,
        MLFlowLogger,
        TensorBoardLogger,
        TrackioLogger,
        WandbLogger,
    )
    from .strategies import (
        STRATEGIES,
        Capabilities,
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        Precision,
        ProcessGroupOptions,
        SingleDeviceStrategy,
        Strategy,
        create_strategy,
    )

__version__ = "0.1.0"

# The leaves come first, because a name of theirs is then found without importing the framework.
_PACKAGES = ("callbacks", "loggers", "strategies", "framework")

__all__ = [
    "STRATEGIES",
    "AdvancedProfiler",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "Capabilities",
    "CheckpointError",
    "CombinedLoader",
    "CometLogger",
    "DDPStrategy",
    "DataModule",
    "DeepSpeedStrategy",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "Engine",
    "FSDPStrategy",
    "GarbageCollection",
    "GradientAccumulationScheduler",
    "JSONLinesLogger",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "Logger",
    "MLFlowLogger",
    "MemorySnapshot",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "Module",
    "Notify",
    "OnExceptionCheckpoint",
    "OptunaPruningCallback",
    "Precision",
    "PredictionWriter",
    "ProcessGroupOptions",
    "Profiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SavePretrained",
    "SimpleProfiler",
    "SingleDeviceStrategy",
    "SpikeDetector",
    "SpikeError",
    "StochasticWeightAveraging",
    "Strategy",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "TrackioLogger",
    "Trainer",
    "Tuner",
    "WandbLogger",
    "WeightAveraging",
    "__version__",
    "cosine_schedule",
    "create_strategy",
    "find_executable_batch_size",
    "generate",
    "get_logger",
    "isolated_rng",
    "launch",
    "linear_schedule",
    "parameter_groups",
    "seed_everything",
    "wsd_schedule",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for package in _PACKAGES:
            module = import_module(f".{package}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
