"""The names that users import: each one is a promise, so none comes or goes unnoticed."""

from __future__ import annotations

from importlib import import_module

import pytest

PUBLIC = {
    "loopwright.framework": {
        "CheckpointError",
        "CombinedLoader",
        "DataModule",
        "Engine",
        "Module",
        "Trainer",
        "find_executable_batch_size",
        "get_logger",
        "isolated_rng",
        "launch",
        "seed_everything",
    },
    "loopwright.callbacks": {
        "Callback",
        "EarlyStopping",
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
    },
    "loopwright.loggers": {
        "CSVLogger",
        "Logger",
        "SilentLogger",
        "TensorBoardLogger",
        "place_of",
    },
    "loopwright.strategies": {
        "STRATEGIES",
        "DDPStrategy",
        "DeepSpeedStrategy",
        "FSDPStrategy",
        "Precision",
        "SingleDeviceStrategy",
        "Strategy",
        "create_strategy",
    },
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_these_public_names(package: str):
    module = import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    "package", [name for name in PUBLIC if name != "loopwright.framework"]
)
def test_a_package_shows_no_other_names(package: str):
    shown = {name for name in dir(import_module(package)) if not name.startswith("_")}
    assert shown == PUBLIC[package]
