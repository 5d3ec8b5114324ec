"""What the agent tells of a job that failed: which rank is to blame, where it was, and its traceback."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from typing import Any, NamedTuple

from .rank_report import (
    HANG_CODE,
    RankReport,
    by_guilt,
    describe_exit,
    read_report,
    shell_code,
)


class JobFailure(NamedTuple):
    """How a job has failed.

    Attributes:
        text: how each rank has ended, the guilty one first.
        exit_code: the guilty one's, as a shell would give it.
        rank: the guilty one.
        reports: of each rank of which something is known, the guilty one's first.
    """

    text: str
    exit_code: int
    rank: int
    reports: list[RankReport]


def failure_text(
    failures: Mapping[int, Any],
    folder: str,
    processes: int,
    num_nodes: int = 1,
    known: Mapping[int, RankReport] | None = None,
    has_all_exits: bool = True,
) -> JobFailure:
    """Say what failed, in the order of guilt: ranks that merely lost a peer come last.

    Args:
        failures: torchelastic's ``ProcessFailure``, by rank.
        folder: where the ranks have written their reports.
        processes: number of ranks on this machine, of which alone its agent knows.
        num_nodes: number of machines.
        known: what the agent knows of ranks that cannot tell it themselves, by rank.
        has_all_exits: ``failures`` has all ranks whose exit code was not 0.
    """
    reports = read_attempt(folder) | dict(known or {})
    for rank, failure in failures.items():
        if rank in reports:
            code = _exit_code(reports[rank], failure.exitcode)
            reports[rank] = replace(reports[rank], exit_code=code)
        else:
            reports[rank] = _report_of_exit(rank, failure)
    first_rank = min(failures) // processes * processes
    ranks = set(range(first_rank, first_rank + processes))
    silent = sorted(ranks - reports.keys() - failures.keys())
    _find_guilty(reports, silent, has_all_exits)
    ordered = by_guilt(reports.values())
    text = describe_job(ordered, processes * num_nodes)
    first = ordered[0]
    # It is never that of success.
    exit_code = first.exit_code or 1
    if first.kind in ("hung", "stopped"):
        exit_code = HANG_CODE
    return JobFailure(text, exit_code, first.rank, ordered)


def describe_job(ordered: Sequence[RankReport], world_size: int) -> str:
    """Return the first of the reports whole, and the others in a line each."""
    first, *others = ordered
    if first.kind == "asked":
        # What has come of it was told when it was asked.
        return first.line(world_size)
    text = first.text(world_size)
    lines = [report.line(world_size) for report in others]
    return f"{text}\n\n" + "\n".join(lines) if lines else text


def read_attempt(folder: str) -> dict[int, RankReport]:
    """Read what the ranks of the last attempt have written into ``folder``, by rank."""
    attempts = glob(os.path.join(folder, "*", "attempt_*"))
    if not attempts:
        return {}
    last_attempt = max(attempts, key=lambda path: int(path.rpartition("_")[2]))
    files = glob(os.path.join(last_attempt, "*", "error.json"))
    reports = [report for path in files if (report := read_report(path))]
    return {report.rank: report for report in reports}


def _report_of_exit(rank: int, failure: Any) -> RankReport:
    """Return what is known of a rank that has told nothing itself."""
    # The agent ends by SIGTERM those whose peer has failed.
    was_stopped = failure.exitcode == -signal.SIGTERM
    return RankReport(
        rank=rank,
        kind="stopped" if was_stopped else "ended",
        message="" if was_stopped else describe_exit(failure.exitcode),
        exit_code=shell_code(failure.exitcode),
        pid=failure.pid,
        time=float(failure.timestamp),
    )


def _exit_code(report: RankReport, code: int) -> int:
    """Return with which code a rank ended: the agent may have ended it before it could leave by itself."""
    was_ended = code in (-signal.SIGTERM, -signal.SIGKILL)
    if was_ended and report.exit_code is not None:
        return report.exit_code
    return shell_code(code)


def _find_guilty(
    reports: dict[int, RankReport], silent: Sequence[int], has_all_exits: bool
) -> None:
    """Find who is to blame where no rank says that it failed.

    Args:
        reports: what is known, by rank; it gets more.
        silent: ranks of which nothing is known.
        has_all_exits: they ended with exit code 0; otherwise, nobody knows.
    """
    kinds = {report.kind for report in reports.values()}
    if kinds == {"stopped"}:
        # None of them was first to end, so it was not the agent that began to send SIGTERM.
        first = by_guilt(reports.values())[0]
        reports[first.rank] = replace(first, kind="ended", message="SIGTERM")
    if not kinds <= {"stopped", "lost"}:
        return
    for rank in silent:
        if has_all_exits:
            message = "exit code 0 before the run was over"
            reports[rank] = RankReport(rank, "ended", message=message, exit_code=0)
        else:
            message = "it hung, or had ended"
            reports[rank] = RankReport(rank, "hung", message=message)
