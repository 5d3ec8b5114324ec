"""Going on after a device ran out of memory."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from ...strategies.launch.environment import detect_environment
from ...strategies.launch.rendezvous import leave_group
from ...strategies.process_group import meet
from ..messages import log
from ..seed import rng_state, set_rng_state
from .engine import Engine
from .out_of_memory import free_memory, is_out_of_memory

_PATIENCE = timedelta(minutes=30)  # for the others to end their call


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
        size, before = starting_batch_size, _Before()
        while size > 0:
            result = None
            with _Attempt() as attempt:
                result = function(size, *args, **kwargs)
            if not attempt.failed:
                return result
            for engine in list(Engine.instances):
                engine.forget()
            attempt.leave()
            before.restore()
            smaller = reduce_size(size)
            log.info("Out of memory with a batch size of %d: trying %d", size, smaller)
            size = smaller
        raise RuntimeError(
            f"{function.__name__} runs out of memory with the smallest batch size that was tried (it began with "
            f"{starting_batch_size})"
        )

    return call


class _Before:
    """What calls that fail must not change: random numbers, and the engines' counters and loss scales."""

    def __init__(self) -> None:
        engines = list(Engine.instances)
        self.device = engines[0].device if engines else None
        self.rng = rng_state(self.device)
        self.engines = [
            (e, e.global_step, e.scaler.state_dict() if e.scaler is not None else {})
            for e in engines
        ]

    def restore(self) -> None:
        set_rng_state(self.rng, self.device)
        for engine, steps, scale in self.engines:
            engine.global_step = steps
            if engine.scaler is not None and scale:
                engine.scaler.load_state_dict(scale)


_attempts = 0  # of this process outside of any other, and so of its peers: they make the same calls
_running: list[_Attempt] = []


class _Attempt:
    """One call of the function, whose end all processes tell each other through the store in which they met.

    A process that ran out of memory says so there and leaves the process group. That ends the collectives in which
    others wait for it, with errors, of which they see there what was the reason.

    Attributes:
        failed: whether any process ran out of memory.
    """

    def __init__(self) -> None:
        global _attempts
        self.failed = False
        self.attempts = 0  # inside of it
        self.environment = environment = detect_environment()
        self.several = environment is not None and environment.world_size > 1
        self.store: Any = None
        self.around = list(_running)
        if self.around:
            self.around[-1].attempts += 1
            self.path = f"{self.around[-1].path}/{self.around[-1].attempts}"
        else:
            _attempts += 1
            self.path = f"attempt/{_attempts}"
        self._over = threading.Event()
        if self.several:
            assert environment is not None
            self.store = PrefixStore(self.path, meet(environment, _PATIENCE))

    def __enter__(self) -> _Attempt:
        _running.append(self)
        if (
            self.several
            and torch.distributed.is_initialized()
            and torch.distributed.is_nccl_available()
        ):
            threading.Thread(target=self._abort_with_peers, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self._over.set()
        _running.remove(self)
        if error is not None and not isinstance(error, Exception):
            return False
        ran_out = error is not None and is_out_of_memory(error)
        if not self.several:
            self.failed = ran_out
            return ran_out
        assert self.environment is not None
        if ran_out:
            self.store.set("ran_out", "")
        self.store.set(str(self.environment.rank), "ended")
        # An error while nobody has run out of memory is one of its own; else it may be but that the others have left.
        self.failed = (
            self._any_failed() if error is None else self.store.check(["ran_out"])
        )
        return self.failed

    def _any_failed(self) -> bool:
        """Wait until all have told how it ended, or one that it ran out of memory."""
        return self._wait(str, or_ran_out=True)

    def _wait(self, key: Callable[[int], str], or_ran_out: bool) -> bool:
        """Wait for what all processes post; returns whether one ran out of memory.

        Raises:
            RuntimeError: if that one is not in this call, but in one around it, or does not come.
        """
        assert self.environment is not None
        keys, began = (
            [key(rank) for rank in range(self.environment.world_size)],
            time.monotonic(),
        )
        while not self.store.check(keys):
            if or_ran_out and self.store.check(["ran_out"]):
                return True
            if any(attempt.store.check(["ran_out"]) for attempt in self.around):
                raise RuntimeError(
                    "another process ran out of memory in the function that called this one"
                )
            if time.monotonic() - began > _PATIENCE.total_seconds():
                raise RuntimeError(
                    f"rank {self.environment.rank} has waited {_PATIENCE} for the other processes to end"
                )
            time.sleep(0.05)
        return self.store.check(["ran_out"])

    def _abort_with_peers(self) -> None:
        """NCCL's collectives do not notice that a peer has left: end them."""
        while not self._over.wait(1.0):
            if self.store.check(["ran_out"]):
                self._over.wait(1.0)
                if not self._over.is_set():
                    torch.distributed.distributed_c10d._abort_process_group()
                return

    def leave(self) -> None:
        """Leave the process group, if there are others, and join a new one where engines had one."""
        free_memory(
            torch.device("cpu")
            if not Engine.instances
            else next(iter(Engine.instances)).device
        )
        if not self.several:
            return
        assert self.environment is not None
        leave_group()
        self.store.set(f"left/{self.environment.rank}", "")
        self._wait(lambda rank: f"left/{rank}", or_ran_out=False)
        for engine in list(Engine.instances):
            engine.connect()
