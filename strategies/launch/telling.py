"""How a process tells of its end: to an agent of ours, which tells of all; else in the failure files and on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from .attempts import this_attempt
from .environment import AGENT, detect_environment
from .failure_files import TEXT_FILE, add_reports
from .peers import Peer
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
    peers: Mapping[int, Peer],
    trace: str | None = None,
) -> None:
    """Tell how this process ends. Of several ranks that fail, only the first one shows its traceback.

    Args:
        own: what is known of it.
        folder: the log folder of its run; empty to write no files.
        peers: the processes of the job on this machine, by rank.
        trace: what to show of its traceback; None if somebody else shows it, or it is told later. Which peers have
            ended without a word is shown in any case.
    """
    if has_own_agent():
        # The disk may be full, and even then this process has to end.
        with suppress(OSError):
            write_report(error_file(), own)
        return
    size = job_size()
    known = _add(folder, size, [own])
    ended = _ended_in_silence(own, known, peers)
    known = _add(folder, size, ended) or known
    line = own.line(size)
    if known:
        line += f" (see {os.path.join(folder, TEXT_FILE)})"
    shown = [report.line(size) for report in ended]
    if trace and _is_first(own, known):
        trace = readable(trace) if known else trace
        shown.append(replace(own, trace=trace).text(size))
    elif trace is not None:
        shown.append(line)
    if shown:
        show("\n".join(shown))
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


def _is_first(own: RankReport, known: list[RankReport]) -> bool:
    """Whether this process is the one whose traceback is shown."""
    if known and known[0].is_guilty:
        return known[0].rank == own.rank
    return own.is_guilty or not known


def _ended_in_silence(
    own: RankReport, known: list[RankReport], peers: Mapping[int, Peer]
) -> list[RankReport]:
    """Return what can be said of ranks that have ended and told nothing, where no rank has told that it failed."""
    if not known or known[0].is_guilty:
        return []
    told = {report.rank for report in known}
    message = "no report of its own: it was killed, or left by os._exit"
    return [
        RankReport(
            rank,
            "ended",
            peer.last_place(),
            message,
            host=own.host,
            pid=peer.pid,
            time=own.time,
        )
        for rank, peer in peers.items()
        if rank not in told and peer.has_ended()
    ]
