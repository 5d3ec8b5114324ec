"""The files that tell how a job has failed: ``failure.json`` for programs, ``failure.txt`` with the same for people.

Whoever knows something adds it: the agents of all machines, or where there is no agent of ours, each rank for itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
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
    is_remote = "://" in folder
    if not is_remote:
        os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, JSON_FILE)
    head = {"job": job, "attempt": max(report.attempt for report in reports)}
    with _locked(path, is_remote):
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
        "format": _FORMAT,
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
        is_same = head.items() <= content.items()
        if is_same and content["time"] >= _STARTED and content["format"] == _FORMAT:
            return [from_dict(values) for values in content["ranks"]]
    return []


def _write(path: str, text: str) -> None:
    """Write a file in one piece: a reader finds it whole, or not at all."""
    if "://" in path:
        with _open(path, "w") as file:
            file.write(text)
        return
    part = f"{path}.{os.getpid()}.part"
    with _open(part, "w") as file:
        file.write(text)
    os.replace(part, path)


def _open(path: str, mode: str) -> Any:
    # File names may hold bytes that are no text.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    if "://" in path:
        import fsspec

        return fsspec.open(path, mode, **options)
    return open(path, mode, **options)


def _locked(path: str, is_remote: bool) -> AbstractContextManager[Any]:
    """Let no other process add something meanwhile. Remote storage has no locks: there, the last one's file stays."""
    if is_remote:
        return nullcontext()
    # Its import takes 40 ms, which a run that goes well need not wait for.
    from filelock import SoftFileLock

    # One lock of each path: a signal may come while this very thread holds it, and its handler adds a report, too.
    return SoftFileLock(f"{path}.lock", timeout=_PATIENCE_SECONDS, is_singleton=True)
