"""The files that tell how a job has failed: ``failure.json`` for programs, ``failure.txt`` with the same for people.

Whoever knows something adds it: the agents of all machines, or where there is no agent of ours, each rank for itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from threading import get_ident
from typing import Any

from .rank_report import RankReport, by_guilt, from_dict, job_code

JSON_FILE = "failure.json"
TEXT_FILE = "failure.txt"

# Raised by changes after which older programs cannot read the file.
_FORMAT = 1
# What was written before this process began is of an earlier job in the same folder.
_STARTED = time.time()
# Who adds something waits so long for another one that does.
_PATIENCE_SECONDS = 5.0
# A lock that is older was left by a process that was killed.
_STALE_SECONDS = 3.0

# The threads that add something. A signal may interrupt one of them.
_ADDING: set[int] = set()


def is_adding() -> bool:
    """Whether a signal has interrupted this thread while it adds a report."""
    return get_ident() in _ADDING


def add_reports(
    folder: str, job: str, world_size: int, reports: Sequence[RankReport]
) -> list[RankReport]:
    """Add to the files in ``folder`` what is known of some ranks; an earlier failure's files are replaced.

    Args:
        folder: local or any fsspec URL; it is made.
        job: a name that all processes of the job give.
        world_size: number of ranks of the job.
        reports: what to add. A rank that is to blame stays so, whatever else is added.

    Returns:
        What is known of all ranks, the guilty one first.

    Raises:
        OSError: if the files cannot be written.
    """
    if "://" not in folder:
        os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, JSON_FILE)
    head = {
        "format": _FORMAT,
        "job": job,
        "attempt": max(report.attempt for report in reports),
    }
    with _locked(path):
        known = {report.rank: report for report in _read(path, head)}
        for report in reports:
            before = known.get(report.rank, report)
            known[report.rank] = by_guilt((before, report))[0]
        ordered = by_guilt(known.values())
        _write(path, json.dumps(_content(head, world_size, ordered), indent=2) + "\n")
        text = "\n\n".join(report.text(world_size) for report in ordered)
        _write(os.path.join(folder, TEXT_FILE), f"{_title(head, ordered)}\n\n{text}\n")
    return ordered


def _content(
    head: Mapping[str, Any], world_size: int, ordered: Sequence[RankReport]
) -> dict[str, Any]:
    first = ordered[0]
    return {
        **head,
        "world_size": world_size,
        "exit_code": job_code(ordered),
        "rank": first.rank,
        "summary": first.line(world_size),
        "time": max(report.time for report in ordered),
        "ranks": [asdict(report) for report in ordered],
    }


def _title(head: Mapping[str, Any], ordered: Sequence[RankReport]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ordered[0].time))
    restarts = f", after {head['attempt']} restarts" if head["attempt"] else ""
    host = f" on {ordered[0].host}" if ordered[0].host else ""
    job = f", job {head['job']}" if head["job"] else ""
    return f"{when}{host}{job}{restarts}"


def _read(path: str, head: Mapping[str, Any]) -> list[RankReport]:
    """Read what others have added for the same attempt at the same job."""
    # Nothing is there yet, or it is damaged, or of another version.
    with suppress(OSError, ValueError, KeyError, TypeError):
        with _open(path, "r") as file:
            content = json.load(file)
        if content["time"] >= _STARTED and head.items() <= content.items():
            return [from_dict(values) for values in content["ranks"]]
    return []


def _write(path: str, text: str) -> None:
    """Write a file in one piece: a reader finds it whole, or not at all."""
    is_remote = "://" in path
    part = path if is_remote else f"{path}.{os.getpid()}.part"
    with _open(part, "w") as file:
        file.write(text)
    if not is_remote:
        os.replace(part, path)


def _open(path: str, mode: str) -> Any:
    # File names may hold bytes that are no text.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    if "://" in path:
        import fsspec

        return fsspec.open(path, mode, **options)
    return open(path, mode, **options)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Let no other process add something meanwhile. Remote storage has no locks: there, the last one's file stays."""
    if "://" in path:
        yield
        return
    lock = f"{path}.lock"
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(FileExistsError):
            open(lock, "x").close()
            break
        with suppress(OSError):
            if time.time() - os.stat(lock).st_mtime > _STALE_SECONDS:
                os.remove(lock)
        if time.monotonic() > give_up:
            raise TimeoutError(f"{lock} is held by another process")
        time.sleep(0.01)
    _ADDING.add(get_ident())
    try:
        yield
    finally:
        # First, as another process may have taken the lock for stale: then it cannot be removed.
        _ADDING.remove(get_ident())
        os.remove(lock)
