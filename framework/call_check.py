"""Debug mode: the processes compare their collective calls before they make them."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .batches import leaves

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__))
_TIMEOUT = "LOOPWRIGHT_DEBUG_TIMEOUT"  # seconds
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


class CallCheck:
    """Tells the other processes, through the store in which they met, what this one is about to call.

    That needs no collective, so it works where one would hang. It costs a round trip to the store for each process.

    Args:
        rank: this process's.
        world_size: number of processes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.timeout = float(os.environ.get(_TIMEOUT, 60))
        self.calls = 0

    def check(self, call: str, data: Any = None, sizes: bool = True) -> None:
        """Compare this call with those of the other processes.

        Args:
            call: its name.
            data: tensors that it takes.
            sizes: whether their shapes must be alike; their types must in any case.

        Raises:
            RuntimeError: if another process calls something else, with other tensors, or does not come within
                ``LOOPWRIGHT_DEBUG_TIMEOUT`` seconds (60); each rank's file and line are named.
        """
        self._post(call, _describe(data, sizes))
        told = {rank: self._wait(rank, call) for rank in range(self.world_size)}
        if len({(each["call"], each["data"]) for each in told.values()}) > 1:
            lines = [f"  rank {rank}: {_words(each)} at {each['where']}" for rank, each in told.items()]
            raise RuntimeError("the processes call different things:\n" + "\n".join(lines))
        self.store.delete_key(self._key(self.rank, self.calls - 2))  # all have read it
        self.calls += 1

    def end(self) -> None:
        """This process makes no further call."""
        self._post("nothing more: it has ended", "")

    def _post(self, call: str, data: str) -> None:
        where = {"call": call, "data": data, "where": _caller()}
        self.store.set(self._key(self.rank, self.calls), json.dumps(where))
        self._last = where

    def _wait(self, rank: int, call: str) -> dict[str, str]:
        key, deadline = self._key(rank, self.calls), time.monotonic() + self.timeout
        try:
            self.store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except dist.DistStoreError:
            before = self._key(rank, self.calls - 1)
            last = "it has made no call" if self.calls == 0 else _last_words(self.store, before)
            raise RuntimeError(
                f"rank {self.rank} waits in {call} at {self._last['where']}, and rank {rank} has not come within "
                f"{self.timeout:g} s ({_TIMEOUT}): {last}"
            ) from None
        return json.loads(self.store.get(key))

    @staticmethod
    def _key(rank: int, number: int) -> str:
        return f"calls/{rank}/{number}"


def _last_words(store: Any, key: str) -> str:
    last = json.loads(store.get(key))
    return f"its last call was {_words(last)} at {last['where']}"


def _words(told: dict[str, str]) -> str:
    return f"{told['call']}({told['data']})"


def _describe(data: Any, sizes: bool) -> str:
    described = []
    for tensor in leaves(data):
        if isinstance(tensor, torch.Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            described.append(f"{dtype}{list(tensor.shape)}" if sizes else f"{dtype}, {max(1, tensor.dim())}-d")
    return ", ".join(described)


def _caller() -> str:
    """File and line of the user's code."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = os.path.abspath(frame.f_code.co_filename)
        outside = not file.startswith((_OWN_FOLDER, _TORCH)) and os.path.basename(file) != "contextlib.py"
        if outside:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
