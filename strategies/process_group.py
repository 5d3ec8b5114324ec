"""Several processes that meet in torch's default process group."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import (
    _flatten_dense_tensors,
    _take_tensors,
    _unflatten_dense_tensors,
)

from .group import Group, SingleProcess, use_device
from .launch.environment import ClusterEnvironment
from .launch.failures import join_job
from .launch.rendezvous import RENDEZVOUS
from .pickling import dumps

# The mean is a sum that is divided afterwards, as gloo has no mean.
_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
# How many bytes of tensors to send in one collective.
BUCKET_BYTES = 2**25


@dataclass(frozen=True)
class ProcessGroupOptions:
    """How processes meet, how long they wait for each other, and how often they are started again.

    Attributes:
        backend: of torch's process group, such as ``"gloo"``; by default the device's own, with gloo beside it for the
            CPU.
        timeout: how long a collective waits for the slowest process before the run is given up.
        max_restarts: how often processes that we started are started again when one fails. A fit then goes on from its
            newest checkpoint.
        for_one_process: make a process group for one process, too, as some libraries need one.

    Raises:
        ValueError: for a time-out that is not above 0, or a number of restarts that is no integer from 0.
    """

    backend: str | None = None
    timeout: timedelta = timedelta(minutes=30)
    max_restarts: int = 0
    for_one_process: bool = False

    def __post_init__(self) -> None:
        timeout = self.timeout
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise ValueError(
                f"timeout must be a datetime.timedelta above 0; got {timeout!r}"
            )
        # True would pass for 1.
        if type(self.max_restarts) is not int or self.max_restarts < 0:
            raise ValueError(
                f"max_restarts must be an integer from 0; got {self.max_restarts!r}"
            )

    def backend_for(self, device: torch.device) -> str:
        """Return the backend of a process group whose processes compute on devices of this type."""
        if self.backend is not None:
            return self.backend
        backend = dist.get_default_backend_for_device(device.type)
        return backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}"


def create_group(
    devices: list[torch.device],
    num_nodes: int,
    environment: ClusterEnvironment | None,
    options: ProcessGroupOptions,
) -> Group:
    """Return the group of a run with one process for each device.

    Args:
        devices: of this machine's processes.
        num_nodes: number of machines.
        environment: what a launcher told this process; None before the others are started, or if there are none.
        options: of the process group, if there are several processes.
    """
    world_size = len(devices) * num_nodes
    device = devices[0]
    if environment is not None:
        world_size = environment.world_size
        device = devices[environment.local_rank]
        join_job()
    if world_size > 1:
        return ProcessGroup(device, world_size, environment, options)
    backend = options.backend_for(device) if options.for_one_process else None
    return SingleProcess(device, backend)


@final
class ProcessGroup(Group):
    """Several processes in torch's default process group; one that another library has made is used as it is.

    Args:
        device: this process's.
        world_size: number of processes.
        environment: what a launcher told this process; None before the others are started.
        options: how they meet.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        environment: ClusterEnvironment | None,
        options: ProcessGroupOptions,
    ) -> None:
        self.device = device
        self.world_size = world_size
        self.environment = environment
        self.options = options
        self.max_restarts = options.max_restarts
        if environment is not None:
            self.rank = environment.rank
            self.local_rank = environment.local_rank
            self.node_rank = environment.node_rank

    def join(self) -> None:
        """Meet the other processes, if that is not done; collectives may follow.

        Raises:
            RuntimeError: if they have not been started, or torch's process group has another number of processes.
        """
        use_device(self.device)
        if self.environment is None and not dist.is_initialized():
            raise RuntimeError(
                f"{self.world_size} processes cannot meet, as they have not been started: fit starts them, or "
                "Engine(launch=True)"
            )
        backend = self.options.backend_for(self.device)
        RENDEZVOUS.join(self, self.environment, backend, self.options.timeout)
        if dist.get_world_size() != self.world_size:
            raise RuntimeError(
                f"torch's process group has {dist.get_world_size()} processes, the Trainer was made for "
                f"{self.world_size}: leave the group to the Trainer, or make them equal"
            )

    def leave(self) -> None:
        RENDEZVOUS.leave_group(self)

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        self._check_alive()
        if op == "mean" and not tensor.is_floating_point():
            tensor = tensor.float()
        reduced = self._reachable(tensor.detach()).clone()
        dist.all_reduce(reduced, _OPERATIONS[op])  # collective
        if op == "mean":
            reduced /= self.world_size
        return reduced.to(tensor.device)

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        self._check_alive()
        if sync_grads and torch.is_grad_enabled():
            return _AllGather.apply(tensor, self)
        sent = self._reachable(tensor.detach()).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(gathered, sent)  # collective
        return torch.stack(gathered).to(tensor.device)

    def gather_objects(self, value: Any) -> list[Any]:
        self._check_alive()
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, dumps(value))  # collective
        return [pickle.loads(content) for content in gathered]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        self._check_alive()
        content: list[Any] = [dumps(value) if self.rank == source else None]
        dist.broadcast_object_list(content, source)  # collective
        return pickle.loads(content[0])

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh"):
                raise RuntimeError(
                    "the module's parameters are in parts, from a run before under another strategy: make the module "
                    "anew, such as with load_from_checkpoint"
                )
        # As many in one message as this may have: each one costs some time, however small it is.
        detached = [tensor.detach() for tensor in tensors if tensor.numel()]
        for bucket in _take_tensors(detached, BUCKET_BYTES):
            flat = _flatten_dense_tensors(bucket)
            # Backends send tensors on devices that they can read: this may be a copy. And they do not know all types.
            sent = self._reachable(flat.view(torch.uint8))
            dist.broadcast(sent, 0)  # collective
            received = _unflatten_dense_tensors(sent.view(flat.dtype), bucket)
            for tensor, value in zip(bucket, received, strict=True):
                tensor.copy_(value)

    def barrier(self) -> None:
        self._check_alive()
        RENDEZVOUS.barrier()  # collective

    def store(self, name: str) -> Any:
        return RENDEZVOUS.group_store(name)

    def _check_alive(self) -> None:
        """Raise if an exception has ended the run here: the other processes will not come to a collective.

        Raises:
            RuntimeError: with what it means for the user's hooks.
        """
        if self.failed:
            raise RuntimeError(
                "an exception has ended the run: its hooks cannot do what takes all processes, such as gathering values"
            )

    def _reachable(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the backend can read it: one for CUDA alone cannot read the CPU."""
        if f"{tensor.device.type}:" in dist.get_backend_config():
            return tensor
        return tensor.to(self.device)


class _AllGather(torch.autograd.Function):
    """Gathers with gradients: that of a process's tensor is the sum, over all processes, of their gradients for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        return group.reduce(gradients[0], "sum")[group.rank], None
