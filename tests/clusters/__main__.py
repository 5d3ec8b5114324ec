"""All clusters, one after the other: ``python -m tests.clusters [CLUSTER …]``, with the scripts' names."""

from __future__ import annotations

import sys

from tests.clusters import mpi, namespaces, ray_train, slurm
from tests.clusters.scenes import finish, play

CLUSTERS = {
    "mpi": ("Open MPI", mpi),
    "namespaces": ("torchrun, 2 machines", namespaces),
    "slurm": ("SLURM", slurm),
    "ray_train": ("Ray Train", ray_train),
}


def main(names: list[str]) -> int:
    """Play all scenes of the clusters with these names, or of all."""
    outcomes = []
    for name in names or CLUSTERS:
        title, script = CLUSTERS[name]
        outcomes += play(title, script.cluster, script.SCENES)
    return finish(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
