"""Where a run is, for a report of its failure: read from the functions that run, so that a healthy run pays nothing."""

from __future__ import annotations

from pathlib import Path
from types import FrameType

from ...callbacks.base import Callback
from ...strategies.launch.failures import Place
from ..checkpoint.schema import RunState
from ..checkpoint.stages import TrainerStatus
from ..datamodule import DataModule
from ..loop.hooks import HOOKS
from ..module import Module

_FRAMEWORK = str(Path(__file__).parent.parent)
_READING = "torch/utils/data/dataloader.py"

# Functions of ours that are a phase, by the ends of their files' names.
_PHASES = {
    ("lifecycle/execute.py", "_set_up"): "setup",
    ("lifecycle/execute.py", "prepare_data"): "prepare_data",
    ("lifecycle/execute.py", "_take_down"): "teardown",
    ("lifecycle/save.py", "save_run"): "checkpoint",
    ("checkpoint/saver.py", "run"): "checkpoint",
    ("checkpoint/saver.py", "wait"): "checkpoint",
    ("checkpoint/saver.py", "finish"): "checkpoint",
}
_WORDS = {
    "setup": "in setup",
    "prepare_data": "in prepare_data",
    "train": "",
    "sanity_check": "in the sanity check",
    "validate": "in validation",
    "test": "in the test",
    "predict": "in prediction",
    "checkpoint": "while a checkpoint was saved",
    "teardown": "in teardown",
}
_LAST_HOOK = "on_fit_end"
_USERS = (Module, Callback, DataModule)
# What users override, beside hooks.
_STEPS = {
    name
    for owner in (Module, DataModule)
    for name in dir(owner)
    if callable(getattr(owner, name))
    if name.endswith(("_step", "_dataloader")) or name.startswith("configure_")
}
_NAMES = {*HOOKS, *_STEPS, "prepare_data", "optimizer_zero_grad", "backward"}


def describe_place(state: RunState, frames: list[FrameType]) -> Place:
    """Return where a run is, or was when it failed.

    Args:
        state: how far it has come.
        frames: what runs, or ran: the outermost first.
    """
    phase = "setup" if state.stage is None else state.stage.value
    if state.status != TrainerStatus.RUNNING:
        phase = "teardown"
    batch = doing = ""
    for frame in frames:
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        if file.startswith(_FRAMEWORK):
            part = file[len(_FRAMEWORK) + 1 :].replace("\\", "/")
            phase = _PHASES.get((part, name), phase)
            if name == "_evaluate_loader":
                batch = _evaluated_batch(frame)
        elif name in _NAMES and (owner := _owner_of(frame)):
            doing = f"in {name} of {owner}"
            if name == _LAST_HOOK:
                phase = "teardown"
        elif not doing and name == "__next__" and file.endswith(_READING):
            doing = "while a batch was read"
    words = [state.where, _WORDS[phase] + batch, doing]
    text = ", ".join(word for word in words if word)
    return Place("validate" if phase == "sanity_check" else phase, text)


def _owner_of(frame: FrameType) -> str:
    """Return the class of whose object a frame runs a method, if it is one of those in which users override hooks."""
    kind = type(frame.f_locals.get("self"))
    return kind.__name__ if issubclass(kind, _USERS) else ""


def _evaluated_batch(frame: FrameType) -> str:
    """Return which batch of which loader the function that evaluates a loader is at."""
    at = frame.f_locals
    # -1 stands for the time before the first.
    batch_idx = max(at.get("batch_idx", 0), 0)
    if at.get("dataloader_idx") is None:
        return f" (batch {batch_idx})"
    return f" (batch {batch_idx} of loader {at['dataloader_idx']})"
