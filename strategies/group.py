"""What strategies with several processes share: the process group, and collectives on it."""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from . import pickling
from .base import Strategy
from .launch.environment import ClusterEnvironment
from .launch.failures import join_job
from .launch.rendezvous import LAST_WORK, STORE, leave, leave_group

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class ProcessGroupStrategy(Strategy):
    """The base of strategies whose processes meet in torch's default process group. One process needs none.

    Args:
        process_group_backend: such as ``"gloo"``; by default the device's own, with gloo beside it for the CPU.
        timeout: how long a collective waits for the slowest process before the run is given up.
        max_restarts: how often processes that we started are started again when one fails.
    """

    def __init__(
        self, process_group_backend: str | None, timeout: timedelta, max_restarts: int
    ) -> None:
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise ValueError(
                f"timeout must be a datetime.timedelta above 0; got {timeout!r}"
            )
        if (
            isinstance(max_restarts, bool)
            or not isinstance(max_restarts, int)
            or max_restarts < 0
        ):
            raise ValueError(
                f"max_restarts must be an integer from 0; got {max_restarts!r}"
            )
        self.process_group_backend, self.timeout, self.max_restarts = (
            process_group_backend,
            timeout,
            max_restarts,
        )
        self.environment: ClusterEnvironment | None = None
        self._group = 0  # the number of the process group that this has joined, of those that we have made

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        self.environment = environment
        self.world_size = len(devices) * num_nodes
        if environment is not None:
            self.world_size, self.global_rank = environment.world_size, environment.rank
            self.local_rank, self.node_rank = (
                environment.local_rank,
                environment.node_rank,
            )
            join_job()
        self.device = devices[self.local_rank]

    def connect(self) -> None:
        global _users
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)
        if self.world_size == 1:
            return
        if not dist.is_initialized():
            if self.environment is None:
                raise RuntimeError(
                    f"{self.world_size} processes cannot meet, as they have not been started: fit starts them, or "
                    "Engine(launch=True)"
                )
            import_module(
                "torch.distributed.nn.functional"
            )  # later, its defaults would keep the group alive
            dist.init_process_group(
                self._backend(),
                timeout=self.timeout,
                store=_next_store(self.environment, self.timeout),
                rank=self.global_rank,
                world_size=self.world_size,
            )
            _users, self._group = 1, _groups
        elif _users and self._group != _groups:
            _users, self._group = _users + 1, _groups
        if dist.get_world_size() != self.world_size:
            raise RuntimeError(
                f"torch's process group has {dist.get_world_size()} processes, the Trainer was made for "
                f"{self.world_size}: leave the group to the Trainer, or make them equal"
            )

    def connect_alone(self) -> None:
        """Make a process group for one process, if it is the only one.

        Raises:
            RuntimeError: if this is one of several processes that a Trainer has joined.
        """
        global _users
        if self.world_size == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f'strategy={self.name!r} cannot run by itself in one of several processes: use strategy="single"'
            )
        if not dist.is_initialized():
            _next_group()
            store: Any = getattr(dist, "HashStore")()  # noqa: B009 # torch documents it, and does not declare it
            dist.init_process_group(self._backend(), store=store, rank=0, world_size=1)
            _users, self._group = 1, _groups

    def disconnect(self) -> None:
        global _users
        if _users and self._group == _groups:
            _users, self._group = _users - 1, 0
            if not _users and dist.is_initialized():
                leave_group()

    def _backend(self) -> str:
        if self.process_group_backend is not None:
            return self.process_group_backend
        kind = self.device.type
        own = dist.get_default_backend_for_device(kind)
        return own if kind == "cpu" else f"cpu:gloo,{kind}:{own}"

    def own_store(self, name: str) -> Store:
        """A part of the store in which the processes met, on a connection of its own, for another thread."""
        store: Any = dist.distributed_c10d._get_default_store()
        return PrefixStore(f"loopwright/{self._group}/{name}", store.clone())

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes rank 0's values.

        Raises:
            RuntimeError: if they are in parts.
        """
        for tensor in tensors:
            if hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh"):
                raise RuntimeError(
                    "the module's parameters are in parts, from a run before under another strategy than "
                    f"{self.name!r}: make the module anew, such as with load_from_checkpoint"
                )
            dense = self._reachable(
                tensor.detach().contiguous()
            )  # what backends can send
            dist.broadcast(dense, 0)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(dense)

    # -- collectives ------------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        """Whether there is nobody to meet.

        Raises:
            RuntimeError: after an exception.
        """
        if self.failed and self.world_size > 1:
            raise RuntimeError(
                "an exception has ended the run: its hooks cannot do what takes all processes, such as gathering values"
            )
        return self.world_size == 1

    def _reachable(self, tensor: Tensor) -> Tensor:
        """The tensor where the backend can read it: one for CUDA alone cannot read the CPU."""
        reachable = f"{tensor.device.type}:" in dist.get_backend_config()
        return tensor if reachable else tensor.to(self.device)

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        if self._is_alone():
            return tensor
        if op == "mean" and not tensor.is_floating_point():
            tensor = tensor.float()
        reduced = self._reachable(tensor.detach()).clone()
        dist.all_reduce(reduced, _OPERATIONS[op])
        return (reduced / self.world_size if op == "mean" else reduced).to(
            tensor.device
        )

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        if self._is_alone():
            return tensor
        if sync_grads and torch.is_grad_enabled():
            return _AllGather.apply(tensor, self)
        mine = self._reachable(tensor.detach()).contiguous()
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return torch.stack(gathered).to(tensor.device)

    def gather_objects(self, value: Any) -> list[Any]:
        if self._is_alone():
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, pickling.dumps(value))
        return [pickle.loads(each) for each in gathered]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        if self._is_alone():
            return value
        holder = [pickling.dumps(value) if self.global_rank == source else None]
        dist.broadcast_object_list(holder, source)
        return pickle.loads(holder[0])  # pyright: ignore[reportArgumentType] # it has been filled

    def barrier(self) -> None:
        if not self._is_alone():
            # Kept alive: a thread of gloo's that dropped it as the interpreter ends would abort the process.
            LAST_WORK[:] = [dist.barrier(async_op=True)]
            LAST_WORK[0].wait()


_groups = 0  # that this process has been in
# How many have joined the group and not left it, if one of them made it; the last to leave ends it. What was merely
# dropped counts on: when it is collected differs between the processes, which must leave together.
_users = 0


def meet(environment: ClusterEnvironment, timeout: timedelta) -> Store:
    """The store in which the processes find each other: one for all groups, and for what needs none."""
    if not STORE:
        meeting = {
            "MASTER_ADDR": environment.address,
            "MASTER_PORT": str(environment.port),
            "RANK": str(environment.rank),
            "LOCAL_RANK": str(environment.local_rank),
            "LOCAL_WORLD_SIZE": str(environment.local_world_size),
            "NODE_RANK": str(environment.node_rank),
            "WORLD_SIZE": str(environment.world_size),
        }
        os.environ.update(meeting)
        STORE.append(next(rendezvous("env://", timeout=timeout))[0])
        atexit.register(leave)
    return STORE[0]


def _next_group() -> None:
    global _groups
    _groups += 1


def _next_store(environment: ClusterEnvironment, timeout: timedelta) -> Store:
    """A part of the store of its own for each group: addresses in the one before are no longer true."""
    _next_group()
    return PrefixStore(f"loopwright/{_groups}", meet(environment, timeout))


class _AllGather(torch.autograd.Function):
    """Gathering that passes gradients back: each process's part gets the sum of what all of them say about it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, strategy: ProcessGroupStrategy) -> Tensor:
        ctx.strategy = strategy
        return strategy.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.strategy.reduce(gradients[0], "sum")[ctx.strategy.global_rank], None
