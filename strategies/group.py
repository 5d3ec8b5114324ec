"""The processes of a run as one of them sees them: which one it is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .launch.rendezvous import RENDEZVOUS


class Group:
    """The processes of a run; a strategy has one of them as ``strategy.group``.

    There are two kinds: :class:`SingleProcess`, and :class:`~.process_group.ProcessGroup` over torch's. With one
    process, a collective gives back what it got, as it does here.

    Attributes:
        device: this process's device.
        rank: this process's index among all of them.
        local_rank: its index on its machine.
        node_rank: its machine's index.
        world_size: number of processes.
        max_restarts: how often the processes are started again when one of them fails, if we start them.
        failed: an exception has ended the run in this process. A collective is an error until the run is torn down, as
            the other processes may be in another one, or gone.
    """

    device: torch.device
    rank = 0
    local_rank = 0
    node_rank = 0
    world_size = 1
    max_restarts = 0
    failed = False

    def join(self) -> None:
        """Meet the other processes, if that is not done; collectives may follow. All processes do."""

    def leave(self) -> None:
        """Undo :meth:`join`. All processes do."""

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Reduce a tensor over all processes.

        Args:
            tensor: of the same shape and type in all processes.
            op: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``.
        """
        return tensor

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Stack the tensors of all processes along a new first dimension, unless there is one process.

        Args:
            tensor: of the same shape and type in all processes.
            sync_grads: whether gradients pass back, each process's to the part that it gave.
        """
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank: anything that can be pickled."""
        return [value]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the value of one process, in all of them.

        Args:
            value: anything that can be pickled.
            source: the rank of the process whose value it is.
        """
        return value

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with that of rank 0.

        Raises:
            RuntimeError: if one of them is sharded.
        """

    def barrier(self) -> None:
        """Wait for all processes."""

    def store(self, name: str) -> Any:
        """Return a ``torch.distributed.Store`` in which processes tell each other something without a collective.

        It has a connection of its own, so that another thread may wait there. All processes ask for it in the same
        order; each time, it is an empty one.
        """


@final
class SingleProcess(Group):
    """One process.

    Args:
        device: its device.
        process_group_backend: make a process group of torch's for this process alone, for a library that needs one.
    """

    def __init__(
        self, device: torch.device, process_group_backend: str | None = None
    ) -> None:
        self.device = device
        self.process_group_backend = process_group_backend

    def join(self) -> None:
        use_device(self.device)
        if self.process_group_backend is not None:
            RENDEZVOUS.join(self, None, self.process_group_backend)

    def leave(self) -> None:
        RENDEZVOUS.leave_group(self)


def use_device(device: torch.device) -> None:
    """Let an accelerator's operations without a device of their own run on this one."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


class GroupMember:
    """What a strategy passes on to its group, as callbacks and modules ask the strategy for it.

    Attributes:
        group: the processes; one on the CPU until the strategy's ``setup_environment``.
    """

    group: Group = SingleProcess(torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.group.device

    root_device = device

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.group.world_size

    @property
    def global_rank(self) -> int:
        """This process's index among all of them."""
        return self.group.rank

    @property
    def local_rank(self) -> int:
        """This process's index on its machine."""
        return self.group.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this process's machine."""
        return self.group.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main process, of rank 0."""
        return self.group.rank == 0

    def use_group(self, group: Group) -> None:
        """Take these processes for those of the run, as one that plays a rank of many."""
        self.group = group

    def disconnect(self) -> None:
        """Leave the other processes. All processes do."""
        self.group.leave()

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Reduce a tensor over all processes: see :meth:`Group.reduce`."""
        return self.group.reduce(tensor, op)

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Stack the tensors of all processes: see :meth:`Group.all_gather`."""
        return self.group.all_gather(tensor, sync_grads)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        return self.group.gather_objects(value)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the value of one process, in all of them: see :meth:`Group.broadcast`."""
        return self.group.broadcast(value, source)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.group.barrier()
