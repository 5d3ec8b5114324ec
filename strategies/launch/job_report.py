"""What the agent tells of a job that failed: which rank is to blame, where it was, and its traceback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from glob import glob
from typing import Any, NamedTuple


class JobFailure(NamedTuple):
    """How a job has failed.

    Attributes:
        text: how each rank has ended, the guilty one first.
        exit_code: that of the first rank that torchelastic has seen to fail, as a shell would give it.
        rank: the guilty one.
    """

    text: str
    exit_code: int
    rank: int


class _RankEnd(NamedTuple):
    """How a rank has ended. Guilty ranks sort before those that lost a peer, and earlier ends before later ones."""

    lost_peers: bool
    time: float
    rank: int
    text: str


def failure_text(
    failures: Mapping[int, Any],
    folder: str,
    processes: int,
    num_nodes: int = 1,
) -> JobFailure:
    """Say what failed, in the order of guilt: ranks that merely lost a peer come last.

    Args:
        failures: torchelastic's ``ProcessFailure``, by rank.
        folder: where the ranks have written their reports.
        processes: number of ranks on this machine, of which alone its agent knows.
        num_nodes: number of machines.
    """
    failures = _without_ended_by_agent(failures)
    first_rank = min(failures) // processes * processes
    world_size = processes * num_nodes
    ends, stopped = _read_reports(folder, first_rank)
    reported = {end.rank for end in ends}
    silent = sorted({first_rank + i for i in range(processes)} - reported)
    for rank in failures.keys() - reported:
        failure = failures[rank]
        how = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            how = failure.signal_name()
        ends.append(_RankEnd(False, failure.timestamp, rank, f"ended with {how}"))
    ends.sort()
    if all(end.lost_peers for end in ends):
        # All of them have lost a rank, and no rank says that it failed. So the guilty one hung: it has written nothing,
        # or was still running when it was stopped.
        hung = dict.fromkeys(silent, "did not answer: it hung, or had ended")
        hung.update(sorted(stopped.items()))
        lost = [end for end in ends if end.rank not in stopped]
        ends = [_RankEnd(True, 0.0, rank, hung[rank]) for rank in hung] + lost
    texts = [f"Rank {end.rank} of {world_size} {end.text}" for end in ends]
    first = next(end.rank for end in ends if end.rank in failures)
    code = failures[first].exitcode
    # As a shell would say: 128 + the number for a signal, and never success.
    exit_code = 128 - code if code < 0 else code or 1
    return JobFailure("\n\n".join(texts), exit_code, ends[0].rank)


def _without_ended_by_agent(failures: Mapping[int, Any]) -> dict[int, Any]:
    """Leave out ranks that the agent has ended by SIGTERM.

    If all have ended by it, somebody else has sent it to the first one.
    """
    ended_by_agent = -signal.SIGTERM
    guilty = {k: v for k, v in failures.items() if v.exitcode != ended_by_agent}
    if guilty:
        return guilty
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    return {first: failures[first]}


def _read_reports(
    folder: str, first_rank: int
) -> tuple[list[_RankEnd], dict[int, str]]:
    """Read what the ranks of the last attempt have written.

    Args:
        folder: where.
        first_rank: the first one of this machine.

    Returns:
        How they ended; and in words, by rank, where those were that the agent has stopped.
    """
    ends: list[_RankEnd] = []
    stopped: dict[int, str] = {}
    attempts = glob(os.path.join(folder, "*", "attempt_*"))
    if not attempts:
        return ends, stopped
    last_attempt = max(attempts, key=lambda path: int(path.rpartition("_")[2]))
    for path in glob(os.path.join(last_attempt, "*", "error.json")):
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        local_rank = int(os.path.basename(os.path.dirname(path)))
        rank = first_rank + local_rank
        message = content["message"]["message"]
        extra = content["message"]["extraInfo"]
        stack = extra["py_callstack"].rstrip()
        where = f" at {content['where']}" if content.get("where") else ""
        if content.get("stopped"):
            stopped[rank] = f"was still running when it was stopped{where}:\n{stack}"
        lost_peers = bool(content.get("lost"))
        text = f"failed{where}:\n{stack}"
        if lost_peers:
            text = f"lost its peers{where}: {message}"
        time = float(content.get("time", extra["timestamp"]))
        ends.append(_RankEnd(lost_peers, time, rank, text))
    return ends, stopped
