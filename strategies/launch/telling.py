"""How a process tells of its end: to an agent of ours, which tells of all; else in the failure files and on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from .attempts import this_attempt
from .environment import AGENT, detect_environment
from .failure_files import TEXT_FILE, add_reports
from .rank_report import RankReport, write_report
from .readable import readable

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def has_own_agent() -> bool:
    """Whether an agent of ours has started this process."""
    return AGENT in os.environ and _ERROR_FILE in os.environ


def error_file() -> str:
    """Return where torchelastic looks for a report of this process; empty if it has not started it."""
    return os.environ.get(_ERROR_FILE, "")


def job_size() -> int:
    """Return the number of ranks of this process's job."""
    environment = detect_environment()
    return 1 if environment is None else environment.world_size


def tell(
    own: RankReport,
    folder: str,
    find_ended: Callable[[], Mapping[int, int]],
    trace: str | None = None,
) -> None:
    """Tell how this process ends. Of several ranks that fail, only the first one shows its traceback.

    Args:
        own: what is known of it.
        folder: the log folder of its run; empty to write no files.
        find_ended: gives the processes of the job on this machine that have ended, as process ids by rank.
        trace: what to show of its traceback; None if somebody else shows it.
    """
    if has_own_agent():
        # The disk may be full, and even then this process has to end.
        with suppress(OSError):
            write_report(error_file(), own)
        return
    size = job_size()
    ended: list[RankReport] = []
    known = _add(folder, size, [own])
    if known and not known[0].is_guilty:
        ended = _ended_in_silence(own, known, find_ended())
        known = _add(folder, size, ended) or known
    is_first = own.is_guilty or not known
    if known and known[0].is_guilty:
        is_first = known[0].rank == own.rank
    line = own.line(size)
    if known:
        line += f" (see {os.path.join(folder, TEXT_FILE)})"
        trace = trace and readable(trace)
    if trace is not None:
        whole = replace(own, trace=trace).text(size) if trace else line
        lines = [report.line(size) for report in ended]
        show("\n".join([*lines, whole if is_first else line]))
    if error_file():
        # torchrun shows it once more.
        with suppress(OSError):
            write_report(error_file(), own, line if known else "")


def show(text: str) -> None:
    """Write to standard error at once, as other processes do."""
    # Not sys.stderr: torch's hook calls ours with another one there, which is written out only afterwards.
    if sys.__stderr__ is not None:
        sys.__stderr__.write(text + "\n")
        sys.__stderr__.flush()


def _add(folder: str, size: int, reports: list[RankReport]) -> list[RankReport]:
    """Add reports to the failure files; returns all that are in them, none if they cannot be written."""
    if not folder or not reports:
        return []
    attempt = this_attempt()
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    job = meeting if size > 1 else ""
    if attempt is not None:
        job = attempt.job
        restarts = attempt.restarts or 0
        reports = [replace(report, attempt=restarts) for report in reports]
    # Also what a remote storage's library raises: this process has to end.
    with suppress(Exception):
        return add_reports(folder, job, size, reports)
    return []


def _ended_in_silence(
    own: RankReport, known: list[RankReport], ended: Mapping[int, int]
) -> list[RankReport]:
    """Return what can be said of ranks that have ended and told nothing, where no rank has told that it failed."""
    told = {report.rank for report in known}
    message = "no report of its own: it was killed, or left by os._exit"
    return [
        RankReport(
            rank, "ended", message=message, host=own.host, pid=pid, time=own.time
        )
        for rank, pid in ended.items()
        if rank not in told
    ]
