"""What a launcher has told this process of its job, in environment variables."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A variable with which users switch the detection of launchers off: "off".
SWITCH = "LOOPWRIGHT_LAUNCH"

# A variable in the processes that we start: the id of the process that did, the agent.
AGENT = "LOOPWRIGHT_AGENT"

# Variables in the processes of a job that may be started again: a name that all its attempts have, and no other job;
# and, in the main process, how many attempts came before.
JOB_OF_AGENTS = "LOOPWRIGHT_AGENT_JOB"
ATTEMPT = "LOOPWRIGHT_ATTEMPT"

# A variable in the processes that we start: the folder in which the agent looks for their signs of life.
BEATS = "LOOPWRIGHT_BEATS"

# A variable in the processes that a command of ours has started: its name.
COMMAND = "LOOPWRIGHT_COMMAND"

_MPI_VARIABLES = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class ClusterEnvironment:
    """Which process of a job this one is, as its launcher says.

    Attributes:
        launcher: who started it, in words.
        rank: its index among all processes.
        world_size: number of processes.
        local_rank: its index on its machine.
        local_world_size: number of processes on its machine.
        node_rank: its machine's index.
        address: where the processes meet: the machine of rank 0.
        port: where they meet there.
        elastic: whether torchelastic started it, which may be so for a single process, too.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    address: str
    port: int
    elastic: bool = False

    @property
    def num_nodes(self) -> int:
        """Number of machines, if each has as many processes."""
        return -(-self.world_size // self.local_world_size)


def restart_count() -> int:
    """Return how often torchelastic has started this process's job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def detect_environment() -> ClusterEnvironment | None:
    """Return what a launcher told this process, if it is one of several (or torchelastic started it).

    Raises:
        ValueError: if a launcher's variables contradict each other, or one is missing.
    """
    if os.environ.get(SWITCH) == "off" or _started_by_a_rank():
        return None
    for find in (_from_variables, _from_slurm, _from_mpi):
        environment = find(os.environ)
        if environment is not None and (
            environment.world_size > 1 or environment.elastic
        ):
            return environment
    return None


def _from_variables(env: Mapping[str, str]) -> ClusterEnvironment | None:
    """Read the variables of torchrun, PyTorchJob, Ray Train, and our own processes."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return None
    rank = int(env["RANK"])
    local_rank = int(env.get("LOCAL_RANK", 0))
    local_size = int(env.get("LOCAL_WORLD_SIZE", 1))
    if local_rank >= local_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE {env.get('LOCAL_WORLD_SIZE')}: set the latter"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    launcher = "the environment (RANK, WORLD_SIZE)"
    if elastic:
        launcher = "torchrun"
    if elastic and AGENT in env:
        launcher = env.get(COMMAND, "this program")
    return ClusterEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=int(env["WORLD_SIZE"]),
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", rank // local_size))),
        address=env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
        elastic=elastic,
    )


def _from_slurm(env: Mapping[str, str]) -> ClusterEnvironment | None:
    # Only srun sets the number of a step's tasks; a batch script that srun did not start runs alone.
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    # Tasks on each machine: "4(x2),3" means 4, 4, 3.
    needed = (
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_LOCALID",
    )
    if not env.get("MASTER_ADDR"):
        needed += ("SLURM_STEP_NODELIST",)
    if missing := [name for name in needed if name not in env]:
        raise ValueError(
            f"SLURM's srun has started this process, and {', '.join(missing)} is not set, as in a container that does "
            f"not get it: pass it on, or set {SWITCH}=off to ignore SLURM"
        )
    tasks: list[int] = []
    for count, _, times in re.findall(
        r"(\d+)(\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"]
    ):
        tasks += [int(count)] * int(times or 1)
    node = int(env["SLURM_NODEID"])
    # Any port that all of the step's tasks choose alike.
    port = 15000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 10000
    return ClusterEnvironment(
        launcher="SLURM's srun",
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=tasks[node],
        node_rank=node,
        address=env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        port=int(env.get("MASTER_PORT") or port),
    )


def first_host(nodes: str) -> str:
    """Return the first machine of a SLURM node list, such as ``gpu[003-007,012],login1``."""
    # The first entry ends before a comma that is outside of brackets.
    first_entry = re.match(r"(?:[^\[\],]|\[\d[^\]]*\])+", nodes)
    if first_entry is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST is no list of machines: {nodes!r}; set MASTER_ADDR"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first_entry.group())


def _from_mpi(env: Mapping[str, str]) -> ClusterEnvironment | None:
    for names in _MPI_VARIABLES:
        if not set(names) <= env.keys():
            continue
        rank, size, local_rank, local_size = (int(env[name]) for name in names)
        address = env.get("MASTER_ADDR")
        if not address and local_size < size:
            raise ValueError(
                f"MPI started {size} processes, {local_size} of them on this machine, and MASTER_ADDR is not set: "
                "set it to the address of rank 0's machine (mpirun -x MASTER_ADDR=…)"
            )
        return ClusterEnvironment(
            launcher="MPI",
            rank=rank,
            world_size=size,
            local_rank=local_rank,
            local_world_size=local_size,
            node_rank=rank // local_size,
            address=address or "127.0.0.1",
            port=int(env.get("MASTER_PORT", 29500)),
        )
    return None


def check_environment(
    environment: ClusterEnvironment,
    devices: int | None,
    num_nodes: int | None,
) -> None:
    """Refuse counts that are not those of the launcher.

    Args:
        environment: what the launcher told this process.
        devices: number of processes on this machine; None accepts any.
        num_nodes: number of machines; None accepts any.

    Raises:
        ValueError: naming both numbers.
    """
    num_local = environment.local_world_size
    for argument, requested, started, what in (
        ("devices", devices, num_local, "processes on this machine"),
        ("num_nodes", num_nodes, environment.num_nodes, "machines"),
    ):
        if requested not in (None, started):
            raise ValueError(
                f"{argument} asks for {requested}, but {environment.launcher} started {started} {what}: make them "
                f'equal, leave {argument}="auto", or set {SWITCH}=off to ignore the launcher'
            )


def runs_alone(
    environment: ClusterEnvironment,
    devices: Any,
    num_nodes: int | str,
    single: bool,
) -> bool:
    """Whether a Trainer in one of several processes asks for no more than a device of its own.

    Args:
        environment: what the launcher told this process.
        devices: as passed.
        num_nodes: as passed.
        single: the strategy is one for a single process.
    """
    if num_nodes not in ("auto", 1):
        return False
    is_one_index = isinstance(devices, list) and len(devices) == 1
    # True would pass for 1.
    is_one = type(devices) is int and devices == 1
    if single:
        return is_one_index or is_one or devices in ("1", "auto")
    if not (is_one_index or is_one or devices == "1"):
        return False
    # A launcher may have started one process on each machine: then one device is its share.
    several_machines = num_nodes == 1 and environment.num_nodes > 1
    return environment.local_world_size > 1 or several_machines


def _started_by_a_rank() -> bool:
    """Whether a rank of ours has started this process for something else, so that it has merely inherited variables.

    The ranks themselves are the agent's children.
    """
    agent = int(os.environ.get(AGENT, os.getppid()))
    if os.getppid() == agent:
        return False
    try:
        # Signal 0 only asks whether the process lives.
        os.kill(agent, 0)
    except ProcessLookupError:
        # The agent has died, and would have ended this process if it had lived a little longer.
        os.kill(os.getpid(), signal.SIGKILL)
    return True
