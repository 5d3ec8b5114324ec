"""What programs read and call of Lightning's strategies, and a strategy here leaves to the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cluster import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from .plugins import TorchCheckpointIO
from .utilities import move_data_to_device

# In this order, as Slurm may start torchrun.
_LAUNCHERS: tuple[type[ClusterEnvironment], ...] = (
    TorchElasticEnvironment,
    KubeflowEnvironment,
    SLURMEnvironment,
    MPIEnvironment,
)


class _Attribute:
    """An attribute that is read from elsewhere, unless a program has given the strategy one of its own.

    Args:
        read: returns it for a strategy.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __get__(self, strategy: Any, kind: type) -> Any:
        return self if strategy is None else self._read(strategy)


def attribute(read: Callable[[Any], Any]) -> Any:
    """Make a method an attribute that a program may set; as a function, for checkers of types."""
    return _Attribute(read)


class AttachedStrategy:
    """A strategy with Lightning's attributes: those of the Trainer that has taken it last; None before.

    Attributes:
        checkpoint_io: writes and reads files by hand; the Trainer does not use it.
        launcher: None, as there is no object that starts processes.
    """

    checkpoint_io = TorchCheckpointIO()
    launcher = None
    restore_checkpoint_after_setup = False
    handles_gradient_accumulation = False
    lightning_restore_optimizer = True
    _trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Take these attributes from a Trainer."""
        self._trainer = trainer

    def _of_trainer(self, name: str) -> Any:
        # A search runs another Trainer, which the module knows.
        running = getattr(vars(self).get("module"), "trainer", None)
        trainer = running or self._trainer
        return None if trainer is None else getattr(trainer, name)

    @attribute
    def lightning_module(self) -> Any:
        """The module of this run, or of the last one."""
        return self._of_trainer("lightning_module")

    @attribute
    def model(self) -> Any:
        """The same: what wraps it in a run is not shown."""
        return self.lightning_module

    @attribute
    def accelerator(self) -> Any:
        """The kind of device."""
        return self._of_trainer("accelerator")

    @attribute
    def precision_plugin(self) -> Any:
        """The precision."""
        return self._of_trainer("precision_plugin")

    @attribute
    def lr_scheduler_configs(self) -> list[Any]:
        """The run's schedulers, and when each steps."""
        return self._of_trainer("lr_scheduler_configs") or []

    @attribute
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._of_trainer("num_nodes") or 1

    @attribute
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return self._of_trainer("num_devices") or 1

    @attribute
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine's processes."""
        device = torch.device(self.root_device)  # type: ignore[attr-defined] # the strategy's
        indices = self._of_trainer("device_ids")
        if device.type == "cpu" or indices is None:
            return [device] * self.num_processes
        return [torch.device(device.type, index) for index in indices]

    @attribute
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.distributed_sampler_kwargs["num_replicas"] > 1

    @attribute
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """This process's index and the number of processes, for a ``DistributedSampler``."""
        found = self._of_trainer("distributed_sampler_kwargs")
        return found or {"num_replicas": 1, "rank": 0}

    @attribute
    def cluster_environment(self) -> ClusterEnvironment:
        """What the launcher's environment tells; of no launcher, one that the Trainer's processes have."""
        for kind in _LAUNCHERS:
            if kind.detect():
                return kind()
        return LightningEnvironment()

    @attribute
    def process_group_backend(self) -> str | None:
        """The argument of that name."""
        options = getattr(self, "group_options", None)
        return None if options is None else options.backend

    def _get_process_group_backend(self) -> str:
        """The backend of the process group."""
        kind = torch.device(self.root_device).type  # type: ignore[attr-defined] # the strategy's
        return self.process_group_backend or ("nccl" if kind == "cuda" else "gloo")

    # Collectives, by the names that Lightning has for their arguments.

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes.

        Args:
            name: accepted for familiarity.
        """
        super().barrier()  # type: ignore[misc] # the strategy's

    def broadcast(
        self,
        value: Any = None,
        source: int = 0,
        *,
        obj: Any = None,
        src: int | None = None,
    ) -> Any:
        """The value of one process, in all of them.

        Args:
            value: anything that can be pickled.
            source: that process.
            obj: Lightning's name for the value.
            src: Lightning's name for the process.
        """
        value = obj if value is None else value
        source = source if src is None else src
        return super().broadcast(value, source)  # type: ignore[misc] # the strategy's

    def reduce(
        self,
        tensor: Tensor,
        op: str | None = "mean",
        group: Any = None,
        reduce_op: str | None = None,
    ) -> Tensor:
        """Reduce a tensor over all processes.

        Args:
            tensor: of the same shape and type in all of them.
            op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"`` or ``"max"``. In Lightning, the group stands here, and then
                None is all processes.
            group: must be None: all processes. After a None, the operation may stand here, as in Lightning.
            reduce_op: the same as ``op``.

        Raises:
            NotImplementedError: for a group.
        """
        if op is None and isinstance(group, str):
            op, group = group, None
        if group is not None:
            raise NotImplementedError(
                f"group must be None: it is reduced over all processes; got {group!r}"
            )
        name = str(reduce_op or op or "mean").lower().rpartition(".")[2]
        return super().reduce(tensor, "mean" if name == "avg" else name)  # type: ignore[misc] # the strategy's

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What all processes, or one of them, say.

        Args:
            decision: this process's.
            all: whether all have to say yes.
        """
        device = self.root_device  # type: ignore[attr-defined] # the strategy's
        says = torch.tensor(float(decision), device=device)
        return bool(self.reduce(says, "min" if all else "max"))

    def batch_to_device(
        self, batch: Any, device: Any = None, dataloader_idx: int = 0
    ) -> Any:
        """A batch on a device, as the module's hooks move it.

        Args:
            batch: the batch.
            device: where to; None is this process's.
            dataloader_idx: which loader it is from.
        """
        target = torch.device(device or self.root_device)  # type: ignore[attr-defined] # the strategy's
        module = self.lightning_module
        if module is None:
            return move_data_to_device(batch, target)
        batch = module.on_before_batch_transfer(batch, dataloader_idx)
        batch = module.transfer_batch_to_device(batch, target, dataloader_idx)
        return module.on_after_batch_transfer(batch, dataloader_idx)
