"""On which devices an engine's processes run, as its arguments and the launcher say."""

from __future__ import annotations

from typing import Any, NamedTuple

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
from ..arguments import check_count
from ..messages import log


class Devices(NamedTuple):
    """Where an engine runs.

    Attributes:
        local: a device for each process of this machine.
        num_nodes: number of machines.
        environment: what a launcher has told this process; None without a launcher, and where the process runs by
            itself.
        is_copy: this process runs all by itself, as rank 0 does, and leaves it to that one to show results.
    """

    local: list[torch.device]
    num_nodes: int = 1
    environment: ClusterEnvironment | None = None
    is_copy: bool = False


def find_devices(
    accelerator: str,
    devices: Any,
    num_nodes: Any,
    strategy: str | Strategy,
) -> Devices:
    """The devices that an engine is to run on.

    Args:
        accelerator: as the Engine takes it.
        devices: as the Engine takes them.
        num_nodes: as the Engine takes it.
        strategy: as the Engine takes it.

    Raises:
        ValueError: for devices that this machine does not have, or numbers that are not those of the launcher.
    """
    check_count("num_nodes", num_nodes, 1, ("auto",))
    environment = detect_environment()
    if environment is None:
        if num_nodes not in ("auto", 1):
            raise ValueError(
                f"num_nodes={num_nodes}: start the program on each of the machines, such as with torchrun --nnodes "
                f"{num_nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py, or "
                "with srun"
            )
        local = select_devices(accelerator, devices)
        one_of_all = devices == "auto" and strategy == "single"
        return Devices(local[:1] if one_of_all else local)
    single = getattr(strategy, "name", strategy) == "single"
    if runs_alone(environment, devices, num_nodes, single):
        return _device_of_its_own(accelerator, devices, environment)
    check_environment(environment, None, None if num_nodes == "auto" else num_nodes)
    local = select_devices(accelerator, devices, environment)
    return Devices(local, environment.num_nodes, environment)


def _device_of_its_own(
    accelerator: str,
    devices: Any,
    environment: ClusterEnvironment,
) -> Devices:
    """The device of a process that runs by itself, though a launcher has started several."""
    join_job()
    rank = environment.rank
    if rank == 0 and environment.world_size > 1:
        log.warning(
            "One device was asked for, and %s started %d processes: each of them runs all of it by itself",
            environment.launcher,
            environment.world_size,
        )
    if isinstance(devices, list):
        device = select_devices(accelerator, devices)[0]
    else:
        local = select_devices(accelerator, "auto", environment)
        device = local[environment.local_rank]
    return Devices([device], is_copy=rank > 0)
