"""Settings of ``accelerate launch`` and its config file, which reach a program as environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ...strategies.launch.environment import COMMAND, detect_environment
from ..messages import log

_PRECISIONS = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
# Variables that ask for another way to train: what they ask for, and the strategy that does it here.
_STRATEGIES = {
    "ACCELERATE_USE_FSDP": ("FSDP", "fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "fsdp"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a ParallelismConfig", "fsdp"),
}
# Variables that have an effect here.
_HONOURED = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_USE_CPU",
)
# Values that ask for nothing: `accelerate launch` sets variables of what was not chosen, too.
_NOTHING = ("", "0", "1.0", "no", "false", "none", "default")
# How many callers in a row have read these variables themselves.
_read_by_caller = [0]


@contextmanager
def reads_itself() -> Iterator[None]:
    """A context in which nothing is asked for: the caller has read what there is, and passes it on."""
    _read_by_caller[0] += 1
    try:
        yield
    finally:
        _read_by_caller[0] -= 1


def launched_precision(precision: Any) -> Any:
    """The precision that was passed, or that of the environment if it is None.

    Raises:
        ValueError: if the environment asks for one that there is not.
    """
    requested = _requested("ACCELERATE_MIXED_PRECISION")
    if precision is not None or not requested:
        if requested:
            _say(
                f"ACCELERATE_MIXED_PRECISION={requested} is ignored: precision={precision!r} was passed"
            )
        return "32-true" if precision is None else precision
    if requested not in _PRECISIONS:
        raise ValueError(
            f"{_launcher()} asks for mixed_precision={requested!r} (ACCELERATE_MIXED_PRECISION): pass a precision= "
            "that there is here"
        )
    _say(
        f"precision={_PRECISIONS[requested]!r}, as {_launcher()} asks for mixed_precision={requested!r} "
        "(ACCELERATE_MIXED_PRECISION)"
    )
    return _PRECISIONS[requested]


def launched_accumulation(argument: str, steps: int) -> int:
    """The number of micro-batches in a window that was passed, or that of the environment if it is 1.

    Args:
        argument: the name under which it was passed.
        steps: what was passed.
    """
    requested = _requested("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if not requested.isdecimal() or int(requested) in (1, steps):
        return steps
    if steps != 1:
        _say(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={requested} is ignored: {argument}={steps} was passed"
        )
        return steps
    _say(
        f"{argument}={requested}, as {_launcher()} asks for gradient_accumulation_steps={requested} "
        "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS)"
    )
    return int(requested)


def launched_debug() -> bool:
    """Whether the environment asks for debug mode."""
    return os.environ.get("LOOPWRIGHT_DEBUG") == "1" or bool(
        _requested("ACCELERATE_DEBUG_MODE")
    )


def launched_accelerator(accelerator: str) -> str:
    """The accelerator that was passed, or the CPU if that is left open and the environment asks for it."""
    if not _requested("ACCELERATE_USE_CPU") or accelerator == "cpu":
        return accelerator
    if accelerator == "auto":
        _say(
            f'accelerator="cpu", as {_launcher()} asks for use_cpu (ACCELERATE_USE_CPU)'
        )
        return "cpu"
    _say(f"ACCELERATE_USE_CPU is ignored: accelerator={accelerator!r} was passed")
    return accelerator


def check_launched_strategy(strategy: Any) -> None:
    """Refuse a strategy that the environment does not ask for, and log which of its settings have no effect.

    Args:
        strategy: as the Engine takes it.

    Raises:
        ValueError: if it asks for another way to spread the model, and ``strategy`` is ``"auto"``.
    """
    for variable, (what, name) in _STRATEGIES.items():
        if strategy == "auto" and _requested(variable):
            raise ValueError(
                f'{_launcher()} asks for {what} ({variable}): pass strategy="{name}" or a Strategy with its '
                "options, launch without, or unset the variable if something else in this program has set it"
            )
    with_fsdp = _requested("ACCELERATE_USE_FSDP")
    prefixes = ("ACCELERATE_", "FSDP_") if with_fsdp else ("ACCELERATE_",)
    ignored = [
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name.startswith(prefixes) and name not in _HONOURED and _requested(name)
    ]
    if ignored:
        _say(
            f"Of what {_launcher()} asks for, this has no effect here: {', '.join(ignored)}"
        )


def _launcher() -> str:
    """The command that has set the variables, which is Accelerate's unless ours says that it was."""
    return os.environ.get(COMMAND, "accelerate launch")


def _requested(variable: str) -> str:
    """A variable's value in small letters; empty if it asks for nothing."""
    if _read_by_caller[0]:
        return ""
    value = os.environ.get(variable, "").lower()
    return "" if value in _NOTHING else value


@cache
def _say(text: str) -> None:
    """Say something once, in the main process."""
    environment = detect_environment()
    if environment is None or environment.rank == 0:
        log.warning(text)
