"""What programs read and call of Lightning's strategies, and a strategy here leaves to the Trainer."""

from __future__ import annotations

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

# In this order, as Slurm may start torchrun.
_LAUNCHERS: tuple[type[ClusterEnvironment], ...] = (
    TorchElasticEnvironment,
    KubeflowEnvironment,
    SLURMEnvironment,
    MPIEnvironment,
)


class AttachedStrategy:
    """A strategy with Lightning's attributes: those of the Trainer that has taken it; None before.

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
        return None if self._trainer is None else getattr(self._trainer, name)

    @property
    def lightning_module(self) -> Any:
        """The module of this run, or of the last one."""
        return self._of_trainer("lightning_module")

    @property
    def model(self) -> Any:
        """The same: what wraps it in a run is not shown."""
        return self.lightning_module

    @property
    def accelerator(self) -> Any:
        """The kind of device."""
        return self._of_trainer("accelerator")

    @property
    def precision_plugin(self) -> Any:
        """The precision."""
        return self._of_trainer("precision_plugin")

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The run's schedulers, and when each steps."""
        return self._of_trainer("lr_scheduler_configs") or []

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._of_trainer("num_nodes") or 1

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return self._of_trainer("num_devices") or 1

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine's processes."""
        device = torch.device(self.root_device)  # type: ignore[attr-defined] # the strategy's
        if device.type == "cpu":
            return [device] * self.num_processes
        return [torch.device(device.type, index) for index in range(self.num_processes)]

    @property
    def is_distributed(self) -> bool:
        """Whether its processes, be it one, form a group."""
        return self.distributed_sampler_kwargs["num_replicas"] > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """This process's index and the number of processes, for a ``DistributedSampler``."""
        return self._of_trainer("distributed_sampler_kwargs") or {
            "num_replicas": 1,
            "rank": 0,
        }

    @property
    def cluster_environment(self) -> ClusterEnvironment:
        """What the launcher's environment tells; of no launcher, one that the Trainer's processes have."""
        for kind in _LAUNCHERS:
            if kind.detect():
                return kind()
        return LightningEnvironment()

    @property
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
        op: str = "mean",
        group: Any = None,
        reduce_op: str | None = None,
    ) -> Tensor:
        """Reduce a tensor over all processes.

        Args:
            tensor: of the same shape and type in all of them.
            op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"`` or ``"max"``. In Lightning, the group stands here.
            group: must be None: all processes.
            reduce_op: the same as ``op``.

        Raises:
            NotImplementedError: for a group.
        """
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
        batch = module.on_before_batch_transfer(batch, dataloader_idx)
        batch = module.transfer_batch_to_device(batch, target, dataloader_idx)
        return module.on_after_batch_transfer(batch, dataloader_idx)
