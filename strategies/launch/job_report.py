"""What the agent tells of a job that failed: which rank is to blame, where it was, and its traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from typing import Any, NamedTuple

from .failure_files import JSON_FILE, TEXT_FILE, add_reports
from .rank_report import (
    RankReport,
    by_guilt,
    describe_exit,
    job_code,
    read_folder,
    read_report,
    shell_code,
)
from .readable import readable
from .watch import last_places

# Of more ranks than these, those that have ended alike share a line; the files have all.
_MOST_LINES = 16


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
    has_all_exits: bool = True,
) -> JobFailure:
    """Say what failed, in the order of guilt: ranks that merely lost a peer come last.

    Args:
        failures: torchelastic's ``ProcessFailure``, by rank.
        folder: where the ranks, and who watches over them, have written their reports.
        processes: number of ranks on this machine, of which alone its agent knows.
        num_nodes: number of machines.
        has_all_exits: ``failures`` has all ranks whose exit code was not 0.
    """
    reports = read_attempt(folder)
    attempt, _ = _last_attempt(folder)
    for rank, failure in failures.items():
        if rank in reports:
            code = _exit_code(reports[rank], failure.exitcode)
            reports[rank] = replace(reports[rank], exit_code=code)
        else:
            reports[rank] = _report_of_exit(rank, failure, attempt)
    first_rank = min(failures) // processes * processes
    ranks = set(range(first_rank, first_rank + processes))
    silent = sorted(ranks - reports.keys() - failures.keys())
    _find_guilty(reports, silent, has_all_exits)
    places = last_places(folder)
    for rank, report in reports.items():
        if not report.place and report.kind != "asked":
            reports[rank] = replace(report, place=places.get(rank, ""))
    ordered = by_guilt(reports.values())
    text = describe_job(ordered, processes * num_nodes)
    return JobFailure(text, job_code(ordered), ordered[0].rank, ordered)


def tell_job(job: JobFailure, folder: str, world_size: int, name: str = "") -> None:
    """Print how a job has failed, and write it into the log folder of its run.

    Args:
        job: as of :func:`failure_text`.
        folder: where the ranks have left their reports.
        world_size: number of ranks.
        name: of the job, which the agents of all its machines give.
    """
    # What is printed must not be lost if the disk is full.
    print(job.text, file=sys.stderr, flush=True)
    place = log_folder(folder)
    if not place or job.reports[0].kind == "asked":
        return
    try:
        add_reports(place, name, world_size, job.reports)
    except Exception as error:
        # Also what a remote storage's library raises.
        print(f"{JSON_FILE} could not be written: {error}", file=sys.stderr)
    else:
        path = os.path.join(place, TEXT_FILE)
        print(f"\nAll of it: {path}", file=sys.stderr)


def describe_job(ordered: Sequence[RankReport], world_size: int) -> str:
    """Return the first of the reports whole, and the others in a line each."""
    first, *others = ordered
    if first.kind == "asked":
        # What has come of it was told when it was asked.
        return first.line(world_size)
    text = readable(first.text(world_size))
    if first.is_guilty:
        # Whether the agent was quicker to stop a rank than the rank to notice makes no difference.
        others = [
            replace(report, kind="lost") if report.kind == "stopped" else report
            for report in others
        ]
    lines = _lines(others, world_size)
    if others and not first.trace:
        # What the first one tells that has lost it is all that there is.
        lines[0] = others[0].line(world_size, is_whole=True)
    return f"{text}\n\n" + "\n".join(lines) if lines else text


def _lines(reports: Sequence[RankReport], world_size: int) -> list[str]:
    """Return a line for each of the reports; if they are many, one for those that have ended alike at one place."""
    if len(reports) <= _MOST_LINES:
        return [report.line(world_size) for report in reports]
    alike: dict[tuple[str, str], list[RankReport]] = {}
    for report in reports:
        alike.setdefault((report.kind, report.place), []).append(report)
    return [
        first.line(world_size) + (f" (so did {len(more)} more)" if more else "")
        for first, *more in alike.values()
    ]


def read_attempt(folder: str) -> dict[int, RankReport]:
    """Read what the ranks of the last attempt have written into ``folder``, by rank."""
    files = glob(os.path.join(_last_attempt(folder)[1], "*", "error.json"))
    reports = [report for path in files if (report := read_report(path))]
    return {report.rank: report for report in reports}


def log_folder(folder: str) -> str:
    """Return the log folder of the run that the ranks of the last attempt have begun; empty if they have none."""
    ranks = glob(os.path.join(_last_attempt(folder)[1], "*"))
    folders = [read_folder(os.path.join(rank, "error.json")) for rank in ranks]
    return next(filter(None, folders), "")


def _last_attempt(folder: str) -> tuple[int, str]:
    """Return how often the ranks were started again, and where in ``folder`` those leave their reports."""
    attempts = glob(os.path.join(folder, "*", "attempt_*"))
    numbers = (int(path.rpartition("_")[2]) for path in attempts)
    return max(zip(numbers, attempts, strict=True), default=(0, folder))


def _report_of_exit(rank: int, failure: Any, attempt: int) -> RankReport:
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
        attempt=attempt,
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
