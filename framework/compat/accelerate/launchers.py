"""Accelerate's launchers: processes for a function, as from a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....strategies.launch.environment import detect_environment
from ...lifecycle.processes import launch
from .imports import install, is_installed
from .state import is_initialized, patch_environment


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Any = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> Any:
    """Call a function in several processes, as :func:`~loopwright.framework.launch`.

    Args:
        function: makes an Accelerator and trains.
        args: its arguments.
        num_processes: how many (default: the accelerators of this machine, or 1).
        mixed_precision: of Accelerators that do not say.
        use_port: accepted: processes of one machine find a port by themselves.
        master_addr: the same.
        node_rank: must be 0.
        num_nodes: must be 1.
        rdzv_backend: accepted, as ``use_port``.
        rdzv_endpoint: the same.
        rdzv_conf: the same.
        rdzv_id: the same.
        max_restarts: how often to call it again, in fresh processes, when it fails in one of several.
        monitor_interval: accepted.
        log_line_prefix_template: accepted.

    Returns:
        What it returned in the main process.

    Raises:
        ValueError: for several machines, or after an Accelerator was made here.
    """
    if num_nodes != 1 or node_rank != 0:
        raise ValueError(
            f"num_nodes={num_nodes}: notebook_launcher starts processes on one machine; for several, start the script "
            "with torchrun on each of them"
        )
    count = num_processes or 0
    starts = detect_environment() is None and count > 1
    if starts and is_initialized():
        raise ValueError(
            "To launch a multi-process training from your notebook, the `Accelerator` should only be initialized "
            "inside your training function. Restart your notebook and make sure no cells initializes an `Accelerator`."
        )
    given = {"ACCELERATE_MIXED_PRECISION": mixed_precision.lower()}
    with patch_environment(**given):
        if not starts and num_processes is not None:
            return function(*args)
        while True:
            try:
                return launch(_call, (is_installed(), function, args), num_processes)
            except Exception:
                if max_restarts <= 0:
                    raise
                max_restarts -= 1


def debug_launcher(
    function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2
) -> None:
    """Call a function in several processes on the CPU, to try it out.

    Args:
        function: makes an Accelerator and trains.
        args: its arguments.
        num_processes: how many.
    """
    with patch_environment(ACCELERATE_USE_CPU="yes", ACCELERATE_MIXED_PRECISION="no"):
        launch(_call, (is_installed(), function, args), num_processes)


def _call(installs: bool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """In each of the processes: call the function."""
    if installs:
        install(quiet=True)
    return function(*args)
