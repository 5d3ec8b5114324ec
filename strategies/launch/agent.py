"""torchelastic's agent, which starts processes of this machine, watches over them and starts them again."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .environment import AGENT, BEATS
from .job_folder import job_folder
from .machine import usable_cpus
from .malloc import add_to_environment
from .restarts import Restarts
from .watch import watching

# What the agent passes on to the processes: SLURM and others announce the end of a job by SIGUSR1 or SIGUSR2.
_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# The agent looks so often at the processes.
_LOOK_SECONDS = 0.05
# A machine that is gone is found within 8 s rather than 15, and those that are enough wait 3 s for more rather than 30.
_QUICK = {"keep_alive_interval": 2, "keep_alive_max_attempt": 4, "last_call_timeout": 3}


@dataclass(frozen=True)
class Nodes:
    """The machines whose agents start a job together, in torchelastic's words.

    Attributes:
        count: how many; at most, if ``least`` is given.
        backend: of the rendezvous: ``"c10d"``, or ``"static"`` where each machine knows its index.
        endpoint: where the agents meet, as ``"host:port"``.
        job: a name that is the same on all machines; empty for one of its own.
        settings: further ones of the rendezvous.
        least: with how many the job begins and goes on; None for all.
        local_addr: this machine's address for the others; None for its host name.
    """

    count: int = 1
    backend: str = "c10d"
    endpoint: str = "127.0.0.1:0"
    job: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    least: int | None = None
    local_addr: str | None = None


ONE_NODE = Nodes()


@contextmanager
def agent(
    processes: int,
    max_restarts: int = 0,
    nodes: Nodes = ONE_NODE,
) -> Iterator[tuple[Callable[..., Any], str]]:
    """Return a context with the agent, ready to launch; afterwards, the environment and signal handlers are restored.

    Args:
        processes: how many to start on this machine.
        max_restarts: how often all are started again when one fails.
        nodes: the machines of the job.

    Returns:
        A function that takes an executable or a function, and returns what runs it in the processes when it is called
        with its arguments; and a folder for what they leave.
    """
    with job_folder() as folder, _environment(processes, folder):
        from .elastic import run

        config = _config(processes, max_restarts, nodes, folder)
        restarts = Restarts(
            max_restarts,
            folder,
            processes,
            nodes.count,
            nodes.least not in (None, nodes.count),
        )
        with watching(folder):
            yield partial(partial, run, config, restarts.follows), folder


@contextmanager
def _environment(processes: int, folder: str) -> Iterator[None]:
    """A context with what the started processes find in their environment, and without torchelastic's tables.

    Args:
        processes: how many are started on this machine.
        folder: for what they leave.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in _FORWARDED}
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    # The tables that it logs name the process that was first seen to fail, which may have lost the guilty one.
    logger.setLevel(logging.CRITICAL)
    os.environ[AGENT] = str(os.getpid())
    os.environ[BEATS] = folder
    num_threads = max(1, usable_cpus() // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    if not torch.accelerator.is_available():
        add_to_environment(os.environ, processes)
    # Processes that are started again must not read the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        # Only in the main thread does torchelastic set handlers, and can they be set.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)


def _config(processes: int, max_restarts: int, nodes: Nodes, folder: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    settings = dict(nodes.settings)
    if nodes.backend == "c10d":
        settings = {**_QUICK, **settings}
    return LaunchConfig(
        min_nodes=nodes.least or nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=processes,
        run_id=nodes.job or uuid.uuid4().hex,
        rdzv_backend=nodes.backend,
        rdzv_endpoint=nodes.endpoint,
        rdzv_configs=settings,
        local_addr="127.0.0.1" if nodes.count == 1 else nodes.local_addr,
        max_restarts=max_restarts,
        monitor_interval=_LOOK_SECONDS,
        signals_to_handle=",".join(forwarded.name for forwarded in _FORWARDED),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
