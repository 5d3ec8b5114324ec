"""Checkpoints of format 1, in which a Trainer's differed from an Engine's."""

from __future__ import annotations

from .schema import loader_state
from .serialization import State


def upgrade(checkpoint: State) -> None:
    """Turn a checkpoint of format 1 into today's :class:`.Checkpoint`, in place.

    A Trainer's held, in ``run``, the counters and what the main rank had of the loader and of the logged values; what
    each other rank had was in ``run["peers"]``. An Engine's held ``loaders``, and a Trainer's only if a user had put
    something there.
    """
    if "run" in checkpoint:
        run = checkpoint["run"]
        state = run["state"]
        ranks = [run, *run.get("peers", [])]
        checkpoint["loader_states"] = [
            [loader_state(state, rank["loader"], rank["cursor"])] for rank in ranks
        ]
        checkpoint["data_seed"] = state.get("seed")
        checkpoint["run"] = {"state": state, "saved_by": run["saved_by"]}
        checkpoint["run"]["logged"] = [
            {name: rank[name] for name in ("metrics", "metric_states")}
            for rank in ranks
        ]
    elif {"registered", "loaders"} <= checkpoint.keys():
        checkpoint["loader_states"] = checkpoint.pop("loaders")
