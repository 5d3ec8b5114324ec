"""One process, one device."""

from __future__ import annotations

import torch

from .base import Strategy
from .group import SingleProcess, use_device
from .launch.environment import ClusterEnvironment
from .module_policy import Policy


class SingleDeviceStrategy(Strategy):
    """Runs a module on one CPU, CUDA, MPS or XPU device in this process.

    Args:
        activation_checkpointing: which submodules compute their activations again in the backward pass: classes or a
            function.
    """

    name = "single"

    def __init__(self, activation_checkpointing: Policy | None = None) -> None:
        self.activation_checkpointing = activation_checkpointing

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        if len(devices) != 1 or num_nodes != 1:
            raise ValueError(
                f"strategy={self.name!r} runs in one process on one device; got devices={len(devices)}, "
                f'num_nodes={num_nodes}. For several, use strategy="ddp"'
            )
        self.group = SingleProcess(devices[0])
        use_device(devices[0])

    forward = Strategy.evaluate
