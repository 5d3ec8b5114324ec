"""The names that users import: each one is a promise, so none comes or goes unnoticed."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import loopwright
from tests.programs import run_program

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
        "TensorBoardLogger",
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
# The root offers all of them.
PUBLIC["loopwright"] = {"__version__"}.union(*PUBLIC.values())


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_these_public_names(package: str):
    module = import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_shows_no_other_names(package: str):
    shown = {name for name in dir(import_module(package)) if not name.startswith("_")}
    if package == "loopwright":
        shown -= {"callbacks", "framework", "loggers", "strategies"}
    assert shown == PUBLIC[package] - {"__version__"}


def test_the_root_imports_nothing_until_it_is_asked():
    program = (
        "import sys, loopwright\n"
        "print(loopwright.__version__, 'torch' in sys.modules, 'importlib.metadata' in sys.modules)\n"
        "print(loopwright.callbacks.Callback is loopwright.Callback, 'loopwright.framework' in sys.modules)\n"
        "print(loopwright.framework.Trainer is loopwright.Trainer)\n"
    )
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        version("loopwright"),
        "False",
        "False",
        "True",
        "False",
        "True",
    ]


def test_a_folder_beside_the_program_is_not_taken_for_the_package(tmp_path: Path):
    (tmp_path / "loopwright" / "framework").mkdir(parents=True)
    program = tmp_path / "program.py"
    program.write_text("import loopwright\nprint(loopwright.__file__)\n")
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == loopwright.__file__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'loopwright' has no attribute 'Trainr'"):
        _ = loopwright.Trainr
