"""Running a function in several processes, for tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from loopwright.framework import Trainer
from loopwright.strategies.launch.launcher import call_in_processes
from tests.programs import descendants, show_stacks


def in_processes(processes: int, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in rank 0 of so many processes; with one, it is called here."""
    if processes == 1:
        return function(*args)
    return in_new_processes(processes, function, *args)


def in_new_processes(processes: int, function: Callable[..., Any], *args: Any) -> Any:
    """As :func:`in_processes`, and never here."""
    timer = threading.Timer(
        90, lambda: show_stacks(descendants(os.getpid())[1:])
    )  # before a test's time-out
    timer.daemon = True
    timer.start()
    try:
        return call_in_processes(_quietly, (function, args), processes)
    finally:
        timer.cancel()


def all_in_processes(
    processes: int, calls: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """What several functions return in rank 0, by name: called one after the other, as starting processes takes long.

    Args:
        processes: how many.
        calls: by name, a function and its arguments.
    """
    return in_processes(processes, call_all, calls)


def told_by(error: BaseException) -> str:
    """What an exception of :func:`in_processes` says, and what the processes have reported."""
    return f"{error}\n{error.__cause__ or ''}"


def call_all(calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What several functions return, by name."""
    found = {}
    for name, (function, *args) in calls.items():
        torch.manual_seed(0)
        found[name] = function(*args)
    return found


def _quietly(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    return function(*args)


def quiet(**arguments: Any) -> Trainer:
    """A Trainer that adopts the processes it finds, and shows and saves nothing."""
    arguments = {
        "logger": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
        **arguments,
    }
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
