"""torchelastic's agent, with what jobs on several machines and jobs that are started again need beside it.

This imports torchelastic, which takes a while: only what starts processes imports this.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic import events, metrics
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from .environment import ATTEMPT, JOB_OF_AGENTS
from .machine import free_port
from .rank_report import HANG_CODE, RankReport, shell_code, write_report

# In seconds: how long a process may go on after SIGTERM when another one has failed, or has been ended because it hung;
# how often agents show each other that they live, and after how long without that, or without an answer of their store,
# one takes another for gone.
_PATIENCE = 5.0
_PATIENCE_AFTER_HANG = 3.0
# How long after a signal the processes may take for their step and a checkpoint. They are watched meanwhile.
_TIME_TO_SAVE = 600.0
_BEAT = 1.0
_SILENCE = 15.0


# Its decorators leave its methods without types.
_TorchAgent: Any = LocalElasticAgent


class JobLost(Exception):
    """This machine cannot go on with the job, as the others have ended it or cannot be reached."""


def run(
    config: LaunchConfig,
    on_failure: Callable[[int, dict[int, Any]], bool],
    entrypoint: Callable[..., Any] | str,
    *args: Any,
) -> None:
    """Start the processes of this machine and wait for their end, as torch's ``elastic_launch`` does.

    Args:
        config: torchelastic's.
        on_failure: called with the number of restarts before and what failed, where another restart is allowed; returns
            whether to restart.
        entrypoint: an executable, or a function that can be pickled.
        *args: its arguments.

    Raises:
        ChildFailedError: if a process failed.
        SignalException: if a signal has ended the agent.
        JobLost: if the other machines have ended the job, or cannot be reached.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    metrics.initialize_metrics()
    closes = False
    handler = None
    try:
        handler = _meeting_place(config)
        agent = Agent(_spec(config, handler, entrypoint, args), config, on_failure)
        closes = True
        result = agent.run()
        events.record(agent.get_event_succeeded(), config.event_log_handler)
    except SignalException:
        # Closed, the rendezvous would let nobody join again.
        closes = False
        raise
    except RendezvousError as error:
        raise JobLost(_explain(error, config.rdzv_endpoint)) from error
    finally:
        if closes and handler is not None:
            with suppress(RendezvousError):
                handler.shutdown()
    # It is None on a machine that was not needed.
    if result is None or result.state is WorkerState.SUCCEEDED:
        return
    if not result.failures:
        raise JobLost("a process hangs in the system, and cannot be ended")
    raise ChildFailedError(str(entrypoint), result.failures)


def _meeting_place(config: LaunchConfig) -> Any:
    """Return what meets the agents of other machines."""
    return get_rendezvous_handler(
        RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            config.local_addr,
            **config.rdzv_configs,
        )
    )


def _spec(
    config: LaunchConfig, handler: Any, entrypoint: Any, args: tuple[Any, ...]
) -> WorkerSpec:
    """Return what torchelastic wants to know of the processes."""
    host = None
    port = None
    if config.rdzv_backend == "static":
        host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=-1)
    return WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=args,
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=host,
        master_port=port,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
    )


def _explain(error: RendezvousError, endpoint: str) -> str:
    """Say why this machine cannot go on."""
    if isinstance(error, RendezvousClosedError):
        return "another machine has ended the job"
    if isinstance(error, RendezvousTimeoutError):
        return "the other machines did not come in time"
    if isinstance(error, RendezvousConnectionError):
        return f"nobody answers where all machines meet, at {endpoint}"
    return str(error)


class Agent(_TorchAgent):
    """Starts the processes of this machine, and watches over them.

    Args:
        spec: what to run.
        config: with which it was made.
        on_failure: see :func:`run`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        config: LaunchConfig,
        on_failure: Callable[[int, dict[int, Any]], bool],
    ) -> None:
        assert config.logs_specs is not None
        super().__init__(spec, config.logs_specs, config.start_method)
        self._on_failure = on_failure
        self._has_peers = config.max_nodes > 1
        self._may_restart = (
            config.max_restarts > 0 or config.min_nodes < config.max_nodes
        )
        self._next_beat = 0.0
        self._healthy_at: float | None = None
        self._is_ending = False
        if self._has_peers:
            threading.Thread(target=self._watch_store, daemon=True).start()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if not self._has_peers:
            # torchelastic's is one that a connection may be given before the first process listens there.
            group: Any = worker_group
            group.master_port = free_port()
        if self._may_restart:
            # The store of the rendezvous lives as long as the job; a part of it is for this attempt.
            store: Any = worker_group.store
            store = store.underlying_store
            name = store.compare_set("loopwright/job", "", uuid.uuid4().hex)
            os.environ[JOB_OF_AGENTS] = name.decode()
            if worker_group.group_rank == 0:
                # Beside the main process; torchelastic's own count leaves out restarts for a machine that joins.
                attempts = store.add("loopwright/attempts", 1)
                os.environ[ATTEMPT] = str(attempts - 1)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._healthy_at = None
        kills = self._kill_late(worker_group)
        result = super()._monitor_workers(worker_group)
        if kills is not None:
            kills.cancel()
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._judge(result)
        elif result.state is WorkerState.HEALTHY and self._has_peers:
            self._beat(worker_group)
            self._healthy_at = time.monotonic()
        return result

    def _judge(self, result: RunResult) -> None:
        """Restart no more if that would not help."""
        if self._remaining_restarts == 0 or not result.failures:
            return
        spec = self._worker_group.spec
        num_restarts = spec.max_restarts - self._remaining_restarts
        if not self._on_failure(num_restarts, result.failures):
            self._remaining_restarts = 0

    def _kill_late(self, worker_group: WorkerGroup) -> threading.Timer | None:
        """Let those be killed that do not leave, if a process has failed: torchelastic would wait for 30 s."""
        processes = [int(worker.id) for worker in worker_group.workers]
        codes = [_failed_with(process) for process in processes]
        if not any(codes):
            return None
        for worker, code in zip(worker_group.workers, codes, strict=True):
            if code == -signal.SIGTERM:
                self._tell_of_signal(worker)
        patience = _PATIENCE
        if HANG_CODE in codes:
            # The others have waited long enough.
            patience = _PATIENCE_AFTER_HANG
        timer = threading.Timer(patience, _kill, [processes])
        timer.start()
        return timer

    def _tell_of_signal(self, worker: Any) -> None:
        """Write how a process ended that somebody else has ended by SIGTERM, and not this agent."""
        path = self._pcontext.error_files[worker.local_rank]
        # What the process has told itself says more.
        if os.path.exists(path):
            return
        signalled = signal.SIGTERM
        report = RankReport(
            rank=worker.global_rank,
            kind="ended",
            message=signalled.name,
            exit_code=shell_code(-signalled),
            pid=int(worker.id),
            time=time.time(),
            attempt=int(os.environ.get(ATTEMPT, 0)),
        )
        write_report(path, report)

    def _shutdown(self, *signals: signal.Signals, timeout: float = 30.0) -> None:
        """End the processes, by the signal that has come, or else by SIGTERM."""
        self._healthy_at = None
        if self._is_ending:
            # Another signal has come while they had time to save, and perhaps before all of them got the first one.
            timeout = _PATIENCE
            # A third one would leave processes behind.
            _ignore_signals()
        elif signals:
            self._is_ending = True
            timeout = _TIME_TO_SAVE
        super()._shutdown(*signals, timeout=timeout)

    # Several machines.

    def _beat(self, worker_group: WorkerGroup) -> None:
        """Show the other agents that this one lives."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT
            store: Any = worker_group.store
            # A store that is gone is found by torchelastic, which asks it for machines that wait.
            with suppress(RuntimeError):
                store.add(f"loopwright/beats/{worker_group.group_rank}", 1)

    def _exit_barrier(self) -> None:
        """Wait until the processes of all machines have ended, but not for a machine that is gone."""
        group: Any = self._worker_group
        store = group.store
        waits_for = {r: (0, time.monotonic()) for r in range(group.group_world_size)}
        del waits_for[group.group_rank]
        # The machine that keeps the store may leave first.
        with suppress(RuntimeError):
            store.set(f"loopwright/ended/{group.group_rank}", "")
            while waits_for:
                for rank, (beats, since) in list(waits_for.items()):
                    beats_now = store.add(f"loopwright/beats/{rank}", 0)
                    if store.check([f"loopwright/ended/{rank}"]):
                        del waits_for[rank]
                    elif beats_now != beats:
                        waits_for[rank] = (beats_now, time.monotonic())
                    elif time.monotonic() > since + _SILENCE:
                        print(f"Machine {rank} is gone", file=sys.stderr)
                        del waits_for[rank]
                time.sleep(0.1)

    def _watch_store(self) -> None:
        """End this machine's part if the store does not answer, as when the network is gone: calls would wait long."""
        while True:
            time.sleep(_BEAT)
            healthy_at = self._healthy_at
            if healthy_at is not None and time.monotonic() > healthy_at + 2 * _SILENCE:
                break
        print("The machine where all meet does not answer; ending", file=sys.stderr)
        sys.stderr.flush()
        _kill([int(worker.id) for worker in self._worker_group.workers])
        os._exit(1)


def _ignore_signals() -> None:
    """Ignore from now on what torchelastic handles; it does so in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for name in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(","):
            signal.signal(signal.Signals[name], signal.SIG_IGN)


def _failed_with(process: int) -> int:
    """Return with what a child has failed, a signal as a negative number, or 0; it can be waited for later."""
    if not hasattr(os, "waitid"):
        return 0
    try:
        found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if found is None:
        return 0
    was_killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return -found.si_status if was_killed else found.si_status


def _kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
