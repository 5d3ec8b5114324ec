"""Accelerate's local SGD: processes train by themselves, and average their parameters from time to time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .options import DistributedType

if TYPE_CHECKING:
    from .accelerator import Accelerator


class LocalSGD:
    """A context in which gradients stay local, and parameters are averaged every few steps.

    Args:
        accelerator: that has prepared the model.
        model: the prepared model.
        local_sgd_steps: how many steps there are between two averages.
        enabled: False trains as without it.

    Raises:
        NotImplementedError: for models that are sharded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        local_sgd_steps: int,
        enabled: bool = True,
    ) -> None:
        if accelerator.distributed_type != DistributedType.NO and not (
            accelerator.multi_device
        ):
            raise NotImplementedError(
                "LocalSGD is supported only for CPUs and GPUs (no DeepSpeed or FSDP)"
            )
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self.no_sync: Any = self.accelerator.no_sync(self.model)
            self.no_sync.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            self.average()
            self.no_sync.__exit__(*error)

    def step(self) -> None:
        """Count an optimizer step, and average parameters if it is time to."""
        self.num_steps += 1
        if not self.enabled:
            return
        self.accelerator.keep_local()
        if self.num_steps % self.local_sgd_steps == 0:
            self.average()

    def average(self) -> None:
        """Average the parameters over the processes. A collective."""
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(self.accelerator.reduce(parameter.data, "mean"))
