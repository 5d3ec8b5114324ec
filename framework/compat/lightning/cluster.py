"""Lightning's environments of launchers: what they say of this process."""

from __future__ import annotations

import os
import signal
from typing import Any

from .utilities import find_free_network_port

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]


class ClusterEnvironment:
    """The environment of a launcher, which Loopwright finds by itself."""

    # The names of variables with the numbers that an environment tells.
    _WORLD_SIZE = "WORLD_SIZE"
    _GLOBAL_RANK = "RANK"
    _LOCAL_RANK = "LOCAL_RANK"
    _NODE_RANK = "GROUP_RANK"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args, kwargs

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else than the Trainer starts the processes."""
        return True

    @property
    def main_address(self) -> str:
        """Where the main process is."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """At which port it is asked."""
        return int(os.environ.get("MASTER_PORT", 12910))

    @staticmethod
    def detect() -> bool:
        """Whether this process is in such an environment."""
        return False

    def world_size(self) -> int:
        """The number of processes."""
        return int(os.environ.get(self._WORLD_SIZE, 1))

    def global_rank(self) -> int:
        """This process's index among all."""
        return int(os.environ.get(self._GLOBAL_RANK, 0))

    def local_rank(self) -> int:
        """This process's index on its machine."""
        return int(os.environ.get(self._LOCAL_RANK, 0))

    def node_rank(self) -> int:
        """The machine's index."""
        return int(os.environ.get(self._NODE_RANK, 0))

    def set_world_size(self, size: int) -> None:
        """Does nothing: the launcher says it."""

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the launcher says it."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Does nothing: the Trainer compares its arguments with the launcher's numbers."""

    def teardown(self) -> None:
        """Does nothing."""


class LightningEnvironment(ClusterEnvironment):
    """No launcher: the Trainer starts the processes."""

    _NODE_RANK = "NODE_RANK"

    def __init__(self) -> None:
        super().__init__()
        self._size = 1
        self._rank = 0
        self._port: int | None = None

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in os.environ

    @property
    def main_port(self) -> int:
        if self._port is None:
            given = os.environ.get("MASTER_PORT")
            self._port = find_free_network_port() if given is None else int(given)
        return self._port

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self._size

    def set_world_size(self, size: int) -> None:
        """Note the number of processes."""
        self._size = size

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Note this process's index."""
        self._rank = rank


class SLURMEnvironment(ClusterEnvironment):
    """Processes that ``srun`` has started.

    Args:
        auto_requeue: the Trainer's argument of that name.
        requeue_signal: SIGUSR1, which is what None means, or SIGUSR2; either one works, whichever is named.

    Raises:
        NotImplementedError: for another signal.
    """

    _WORLD_SIZE = "SLURM_NTASKS"
    _GLOBAL_RANK = "SLURM_PROCID"
    _LOCAL_RANK = "SLURM_LOCALID"
    _NODE_RANK = "SLURM_NODEID"

    def __init__(self, auto_requeue: bool = True, requeue_signal: Any = None) -> None:
        if requeue_signal not in (None, signal.SIGUSR1, signal.SIGUSR2):
            raise NotImplementedError(
                "requeue_signal must be SIGUSR1 or SIGUSR2, as in #SBATCH --signal=SIGUSR1@120; got "
                f"{requeue_signal!r}"
            )
        super().__init__(auto_requeue=auto_requeue, requeue_signal=requeue_signal)
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal

    @staticmethod
    def detect() -> bool:
        name = SLURMEnvironment.job_name()
        return "SLURM_NTASKS" in os.environ and name not in ("bash", "interactive")

    @staticmethod
    def job_name() -> str | None:
        """The job's name."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """The job's number, unless it is an interactive one."""
        number = os.environ.get("SLURM_JOB_ID", "")
        is_batch = SLURMEnvironment.job_name() not in ("bash", "interactive")
        return int(number) if number.isdecimal() and is_batch else None


class TorchElasticEnvironment(ClusterEnvironment):
    """Processes that torchrun has started."""

    @staticmethod
    def detect() -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ


class MPIEnvironment(ClusterEnvironment):
    """Processes that MPI has started."""

    _WORLD_SIZE = "OMPI_COMM_WORLD_SIZE"
    _GLOBAL_RANK = "OMPI_COMM_WORLD_RANK"
    _LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"
    _NODE_RANK = "OMPI_COMM_WORLD_NODE_RANK"


class KubeflowEnvironment(ClusterEnvironment):
    """Processes that a PyTorchJob has started."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()
