"""On which devices an engine's processes run, as its arguments and the launcher say."""

from __future__ import annotations

from typing import Any

import torch

from ...strategies import Strategy
from ...strategies.accelerator import select_devices
from ...strategies.launch.environment import (
    ClusterEnvironment,
    check_environment,
    detect_environment,
    runs_alone,
)
from ...strategies.launch.failures import join_job
from ..messages import log


class Devices:
    """What an engine was asked to run on, and what that comes to in this process.

    Args:
        accelerator: as the Engine takes it.
        devices: as the Engine takes them.
        num_nodes: as the Engine takes it.

    Attributes:
        requested: ``devices`` as given.
        environment: this process among those that a launcher has started; None without a launcher, and where this process
            runs by itself.
        is_copy: this process runs by itself, and so does another one, which shows what comes of it.
        local: a device for each process of this machine.
        num_nodes: number of machines.

    Raises:
        ValueError: if ``num_nodes`` is no such number.
    """

    environment: ClusterEnvironment | None
    is_copy: bool
    local: list[torch.device]
    num_nodes: int

    def __init__(self, accelerator: str, devices: Any, num_nodes: Any) -> None:
        is_int = isinstance(num_nodes, int) and not isinstance(num_nodes, bool)
        if num_nodes != "auto" and (not is_int or num_nodes < 1):
            raise ValueError(
                f'num_nodes must be an integer from 1, or "auto"; got {num_nodes!r}'
            )
        self.requested = devices
        self._accelerator = accelerator
        self._num_nodes = num_nodes

    def find(self, strategy: str | Strategy) -> None:
        """Look at this machine, and at what a launcher has told this process.

        Raises:
            ValueError: for devices that this machine does not have, or that the launcher has no processes for.
        """
        devices, num_nodes = self.requested, self._num_nodes
        self.is_copy = False
        self.num_nodes = 1
        self.environment = environment = detect_environment()
        if environment is None:
            self.local = self._find_without_launcher(strategy)
            return
        single = getattr(strategy, "name", strategy) == "single"
        if runs_alone(environment, devices, num_nodes, single):
            self.local = [self._own_device(environment)]
            return
        check_environment(environment, None, None if num_nodes == "auto" else num_nodes)
        self.local = select_devices(self._accelerator, devices, environment)
        self.num_nodes = environment.num_nodes

    def _find_without_launcher(self, strategy: str | Strategy) -> list[torch.device]:
        devices, num_nodes = self.requested, self._num_nodes
        if num_nodes not in ("auto", 1):
            raise ValueError(
                f"num_nodes={num_nodes}: start the program on each of the machines, such as with torchrun --nnodes "
                f"{num_nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py, or "
                "with srun"
            )
        found = select_devices(self._accelerator, devices)
        return found[:1] if devices == "auto" and strategy == "single" else found

    def _own_device(self, environment: ClusterEnvironment) -> torch.device:
        """The device on which this process runs by itself, though a launcher has started several."""
        join_job()
        self.environment = None
        self.is_copy = environment.rank > 0
        if environment.rank == 0 and environment.world_size > 1:
            log.warning(
                "One device was asked for, and %s started %d processes: each of them runs all of it by itself",
                environment.launcher, environment.world_size,
            )  # fmt: skip
        if isinstance(self.requested, list):
            return select_devices(self._accelerator, self.requested)[0]
        return select_devices(self._accelerator, "auto", environment)[
            environment.local_rank
        ]
