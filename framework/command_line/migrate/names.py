"""Which name of Lightning or Accelerate is which of ours."""

from __future__ import annotations

from typing import Literal

Target = Literal["face", "native"]

# Packages whose names have a face, and where that is. The longest match counts.
FACES = {
    "lightning": "loopwright.lightning",
    "lightning.pytorch": "loopwright.lightning",
    "lightning.fabric": "loopwright.lightning.fabric",
    "pytorch_lightning": "loopwright.lightning",
    "lightning_fabric": "loopwright.lightning.fabric",
    "accelerate": "loopwright.accelerate",
}
# Packages that are looked for, by whom they belong to.
FAMILIES = {
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "lightning_fabric": "lightning",
    "accelerate": "accelerate",
}
# Parts of these packages that no face has.
NOT_SERVED = {
    "lightning.app": "Lightning's apps are no part of training",
    "lightning.data": "use litdata, whose streams are read as they are",
    "lightning.store": "Lightning's model store is no part of training",
    "lightning.pytorch_lightning": "write lightning.pytorch",
    "pytorch_lightning.metrics": "use torchmetrics",
    "lightning.pytorch.metrics": "use torchmetrics",
}

# Where Lightning 1 had what Lightning 2 has elsewhere: paths below its root.
MOVED = {
    "callbacks.base": "callbacks.callback",
    "callbacks.xla_stats_monitor": "callbacks.device_stats_monitor",
    "core.lightning": "core.module",
    "loggers.base": "loggers.logger",
    "profiler": "profilers",
    "utilities.distributed": "utilities.rank_zero",
    "utilities.seed.seed_everything": "seed_everything",
    "utilities.apply_func": "utilities",
}

# Names below the root of Lightning, and what they are called here. A module between the folder and the class, such as
# callbacks.model_checkpoint.ModelCheckpoint, is left out before the look-up.
_CALLBACKS = (
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
)
_STRATEGIES = (
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "SingleDeviceStrategy",
    "Strategy",
)
_NATIVE_LIGHTNING = {
    "": "loopwright",
    "Callback": "loopwright.Callback",
    "LightningDataModule": "loopwright.DataModule",
    "LightningModule": "loopwright.Module",
    "Trainer": "loopwright.Trainer",
    "callbacks": "loopwright.callbacks",
    "core.LightningDataModule": "loopwright.DataModule",
    "core.LightningModule": "loopwright.Module",
    "loggers": "loopwright.loggers",
    "loggers.CSVLogger": "loopwright.loggers.CSVLogger",
    "loggers.Logger": "loopwright.loggers.Logger",
    "loggers.TensorBoardLogger": "loopwright.loggers.TensorBoardLogger",
    "seed_everything": "loopwright.seed_everything",
    "strategies": "loopwright.strategies",
    "trainer.Trainer": "loopwright.Trainer",
    "tuner.Tuner": "loopwright.Tuner",
    "utilities.CombinedLoader": "loopwright.CombinedLoader",
    "utilities.seed_everything": "loopwright.seed_everything",
    "utilities.isolate_rng": "loopwright.isolated_rng",
    "callbacks.RichProgressBarTheme": "loopwright.callbacks.RichProgressBarTheme",
    **{f"callbacks.{name}": f"loopwright.callbacks.{name}" for name in _CALLBACKS},
    **{f"strategies.{name}": f"loopwright.strategies.{name}" for name in _STRATEGIES},
}
_NATIVE_ACCELERATE = {
    "": "loopwright",
    "Accelerator": "loopwright.Engine",
    "accelerator.Accelerator": "loopwright.Engine",
    "launchers.notebook_launcher": "loopwright.launch",
    "logging.get_logger": "loopwright.get_logger",
    "notebook_launcher": "loopwright.launch",
    "utils.find_executable_batch_size": "loopwright.find_executable_batch_size",
    "find_executable_batch_size": "loopwright.find_executable_batch_size",
    "utils.set_seed": "loopwright.seed_everything",
}
# Those of these names that are packages.
_FOLDERS = (
    "loopwright",
    "loopwright.callbacks",
    "loopwright.loggers",
    "loopwright.strategies",
)
_NATIVE = {"lightning": _NATIVE_LIGHTNING, "accelerate": _NATIVE_ACCELERATE}


def family_of(path: str) -> str:
    """Return whose name a dotted path is: ``"lightning"``, ``"accelerate"``, or an empty text for anybody else's."""
    root, _, rest = path.partition(".")
    if root == "loopwright":
        # A face's name: rewritten before, and still to be looked at.
        face = rest.partition(".")[0]
        return face if face in ("lightning", "accelerate") else ""
    return FAMILIES.get(root, "")


def is_face(path: str) -> bool:
    """Whether a dotted path is one of ours already."""
    return path.partition(".")[0] == "loopwright"


def reason_not_served(path: str) -> str:
    """Return why a path has no counterpart here; an empty text if it has one."""
    for package, reason in NOT_SERVED.items():
        if path == package or path.startswith(f"{package}."):
            return reason
    return ""


def translate(path: str, target: Target) -> str:
    """Return what a name of Lightning's or Accelerate's is called here.

    Args:
        path: its dotted path.
        target: ``"face"`` for the same name under ``loopwright.lightning`` or ``loopwright.accelerate``; ``"native"``
            for Loopwright's own, where there is one.
    """
    if target == "native":
        native = _native(path)
        if native:
            return native
    package = max((p for p in FACES if _is_below(path, p)), key=len)
    rest = path[len(package) :].lstrip(".")
    return ".".join(filter(None, [FACES[package], _moved(rest)]))


def is_native(path: str) -> bool:
    """Whether there is a name of Loopwright's own for a path."""
    return not is_face(path) and bool(_native(path))


def _native(path: str) -> str:
    package = max((p for p in FACES if _is_below(path, p)), key=len)
    if FACES[package].endswith("fabric"):
        return ""
    names = _NATIVE[family_of(path)]
    parts = _moved(path[len(package) :].lstrip(".")).split(".")
    for length in range(len(parts), 0, -1):
        name = names.get(_without_file(parts[:length]), "")
        rest = parts[length:]
        # What is below a folder is there only if the table has it, and what is below a class is the class's.
        if name and not (rest and name in _FOLDERS):
            return ".".join([name, *rest])
    return ""


def _without_file(parts: list[str]) -> str:
    """Leave out the modules between a folder and a name: callbacks.timer.Timer is callbacks.Timer."""
    if len(parts) > 2:
        parts = [parts[0], parts[-1]]
    return ".".join(parts)


def _moved(rest: str) -> str:
    for old, new in MOVED.items():
        if _is_below(rest, old):
            return new + rest[len(old) :]
    return rest


def _is_below(path: str, package: str) -> bool:
    return path == package or path.startswith(f"{package}.")
