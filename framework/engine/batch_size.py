"""Calling a function again with a smaller batch size when memory ran out."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ...strategies.launch.environment import detect_environment
from ...strategies.launch.rendezvous import RENDEZVOUS
from ..messages import log
from ..seed import rng_state, set_rng_state
from .engine import Engine
from .out_of_memory import free_memory, is_out_of_memory

# How long a process waits for the others to end their call.
_PATIENCE = timedelta(minutes=30)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[int], int] | None = None,
) -> Any:
    """Decorate a function to be called again with a smaller batch size when memory runs out.

    ::

        @find_executable_batch_size(starting_batch_size=256)
        def train(batch_size):
            engine.free_memory()
            model, optimizer = engine.prepare(*create(batch_size))
            ...


        train()

    Each call begins with the random numbers of the first, and what engines had prepared is forgotten before it. With
    several processes, all of them call the function; if one of them runs out of memory, wherever the others are, all
    leave it and call it again with the same smaller size.

    Args:
        function: takes the batch size as its first argument.
        starting_batch_size: of the first call.
        reduce_batch_size_fn: gives the next size of the last one (default: half of it).

    Raises:
        RuntimeError: if memory does not suffice for one sample.
        TypeError: if a batch size is passed to the decorated function.
    """
    if function is None:
        return partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    reduce_size = reduce_batch_size_fn or (lambda size: size // 2)
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        raise TypeError(
            f"{function.__name__} must take the batch size as its first argument"
        )

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if parameters[0] in kwargs or len(args) >= len(parameters) > 0:
            raise TypeError(
                f"{function.__name__} gets its {parameters[0]} from find_executable_batch_size: leave it out"
            )
        rollback = _Rollback()
        size = starting_batch_size
        while size > 0:
            result = None
            with _Attempt() as attempt:
                result = function(size, *args, **kwargs)
            if not attempt.failed:
                return result
            for engine in list(Engine.instances):
                engine.forget(interrupted=True)
            attempt.leave()
            rollback.apply()
            smaller = reduce_size(size)
            log.info("Out of memory with a batch size of %d: trying %d", size, smaller)
            size = smaller
        raise RuntimeError(
            f"No executable batch size found, reached zero: {function.__name__} runs out of memory with the smallest "
            f"batch size that was tried (it began with {starting_batch_size})"
        )

    return call


class _Rollback:
    """What calls that fail must not change: random numbers, and the engines' counters and loss scales."""

    def __init__(self) -> None:
        self.device = _device()
        self.rng = rng_state(self.device)
        self.engines = []
        for engine in list(Engine.instances):
            scaler = engine.scaler
            scale = {} if scaler is None else scaler.state_dict()
            self.engines.append((engine, engine.global_step, scale))

    def apply(self) -> None:
        """Set them to what they were."""
        set_rng_state(self.rng, self.device)
        for engine, global_step, scale in self.engines:
            engine.global_step = global_step
            if engine.scaler is not None and scale:
                engine.scaler.load_state_dict(scale)


def _device() -> torch.device | None:
    engines = list(Engine.instances)
    return engines[0].device if engines else None


class _Attempt:
    """One call of the function, whose end each process writes into torch's store.

    A process that ran out of memory writes that, too, and leaves the process group. Others may wait for it in a
    collective, which then raises an error; in the store they see that the reason was memory.

    All processes make the same attempts, so a number tells which one is meant. Attempts inside an attempt have numbers
    of their own within it: when it fails, some processes may have begun fewer of them than others.

    Attributes:
        failed: whether any process ran out of memory.
        path: its number, after those of the attempts around it.
        num_inner: how many attempts there have been inside of it.
    """

    def __init__(self) -> None:
        self.failed = False
        # The attempts inside of which this one is made, the innermost last.
        self.outer = list(_running)
        parent = self.outer[-1] if self.outer else _program
        parent.num_inner += 1
        self.path = f"{parent.path}/{parent.num_inner}"
        self.num_inner = 0
        self.rank = 0
        self.world_size = 1
        self.store: Any = None
        self._over = threading.Event()
        environment = detect_environment()
        if environment is not None and environment.world_size > 1:
            self.rank = environment.rank
            self.world_size = environment.world_size
            self.store = PrefixStore(
                self.path, RENDEZVOUS.store(environment, _PATIENCE)
            )

    def __enter__(self) -> _Attempt:
        _running.append(self)
        has_group = self.store is not None and dist.is_initialized()
        if has_group and dist.is_nccl_available():
            threading.Thread(target=self._abort_with_peers, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self._over.set()
        _running.remove(self)
        if error is not None and not isinstance(error, Exception):
            return False
        self.failed = error is not None and is_out_of_memory(error)
        if self.store is not None:
            if self.failed:
                self.store.set(_RAN_OUT, "")
            self.store.set(f"ended/{self.rank}", "")
            if error is None:
                self._wait("ended", or_ran_out=True)
            # If a process ran out of memory, an error here may only mean that it has left the process group. If none
            # did, the error is this process's own, and is raised.
            self.failed = self.store.check([_RAN_OUT])
        return self.failed

    def _wait(self, event: str, or_ran_out: bool) -> None:
        """Wait until all processes have written an event into the store.

        Args:
            event: ``"ended"`` or ``"left"``.
            or_ran_out: stop waiting, too, when one has run out of memory.

        Raises:
            RuntimeError: if one has run out of memory in an attempt around this one, or does not come.
        """
        keys = [f"{event}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        while not self.store.check(keys):
            if or_ran_out and self.store.check([_RAN_OUT]):
                return
            if any(attempt.store.check([_RAN_OUT]) for attempt in self.outer):
                raise RuntimeError(
                    "another process ran out of memory in the function that called this one"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {self.rank} has waited {_PATIENCE} for the other processes to end"
                )
            time.sleep(0.05)

    def _abort_with_peers(self) -> None:
        """In a thread: end this process's collectives when a peer ran out of memory, which NCCL does not notice."""
        while not self._over.wait(1.0):
            if self.store.check([_RAN_OUT]):
                if not self._over.wait(1.0):
                    dist.distributed_c10d._abort_process_group()
                return

    def leave(self) -> None:
        """Leave the process group, if there are others, and join a new one where engines had one."""
        free_memory(_device() or torch.device("cpu"))
        if self.store is not None:
            RENDEZVOUS.destroy_process_group()
            self.store.set(f"left/{self.rank}", "")
            self._wait("left", or_ran_out=False)
            for engine in list(Engine.instances):
                engine.connect()


_RAN_OUT = "ran_out"
_running: list[_Attempt] = []
# Stands around the outermost attempts.
_program = SimpleNamespace(path="attempt", num_inner=0)
