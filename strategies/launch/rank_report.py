"""What is known of how a rank has ended, in the form in which ranks and agents tell it to each other and to files."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["failed", "hung", "ended", "asked", "stopped", "lost"]

# Ranks of the first kinds are to blame. If there are none, then what was still running is what the others waited for.
_GUILT: dict[Kind, int] = {
    "failed": 0,
    "hung": 0,
    "ended": 0,
    "asked": 1,
    "stopped": 2,
    "lost": 3,
}

# A line of C++ in the message of an error.
_SOURCE = re.compile(r"\[?/\S+\.(?:cc|cpp|h):\d+\]? ")

# What a job ends with when a rank hung, as the command ``timeout`` does.
HANG_CODE = 124

# So much later than they were, errors of ranks that merely lost a peer are dated where torchrun reads them.
_LATER_SECONDS = 10


@dataclass(frozen=True)
class RankReport:
    """How a rank has ended, as far as somebody knows.

    Attributes:
        rank: the rank.
        kind: ``"failed"``: it raised. ``"hung"``: it did not move. ``"ended"``: its process was gone, by a signal or
            too early. ``"asked"``: it ended as a signal had asked it to. ``"stopped"``: it was told to end, as a peer
            had. ``"lost"``: it could not go on without a peer.
        place: how far its run had come, in words; empty if nobody knows.
        message: what happened: the exception, or how the process ended.
        trace: the traceback of the exception; of a rank that was running, its stacks.
        exit_code: of its process, as a shell gives it; None if nobody knows.
        host: its machine.
        pid: its process there; 0 if nobody knows.
        time: when it happened, in seconds since 1970. For a rank that hung, when it last moved.
        attempt: how often the job had been restarted.
    """

    rank: int
    kind: Kind
    place: str = ""
    message: str = ""
    trace: str = ""
    exit_code: int | None = None
    host: str = ""
    pid: int = 0
    time: float = 0.0
    attempt: int = 0

    @property
    def is_guilty(self) -> bool:
        """Whether the rank is to blame, and not a peer of it."""
        return _GUILT[self.kind] == 0

    def headline(self, world_size: int) -> str:
        """Return which rank ended, how and where, as a line without its end."""
        how = {
            "failed": "failed",
            "hung": "did not answer",
            "ended": f"ended with {self.message}",
            "asked": f"ended by {self.message}, as asked",
            "stopped": "was still running when it was stopped",
            "lost": "lost its peers",
        }[self.kind]
        # A process that could not tell where it was has told it up to a second before.
        at = ", last seen at" if self.kind == "ended" and not self.trace else " at"
        where = f"{at} {self.place}" if self.place else ""
        return f"Rank {self.rank} of {world_size} {how}{where}"

    def line(self, world_size: int, is_whole: bool = False) -> str:
        """Return all but the traceback, in one line; or with the whole message, which may have several."""
        message = self.message if is_whole else first_line(self.message)
        if self.kind == "lost" and not is_whole:
            # gloo and NCCL name a line of their code, and go on with advice.
            message = _SOURCE.sub("", message).partition(". ")[0]
        if self.kind in ("ended", "asked"):
            # It stands in the headline.
            message = ""
        return self.headline(world_size) + (f": {message}" if message else "")

    def text(self, world_size: int) -> str:
        """Return all of it: a line, and the traceback, which ends with the message, or the stacks."""
        if not self.trace:
            return self.line(world_size)
        is_traceback = self.kind in ("failed", "lost")
        head = self.headline(world_size) if is_traceback else self.line(world_size)
        return f"{head}:\n{self.trace.rstrip()}"


def first_line(text: str, most: int = 300) -> str:
    """Return the first line of ``text`` that is not empty, of at most so many characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= most else f"{line[:most]} …"


def by_guilt(reports: Iterable[RankReport]) -> list[RankReport]:
    """Sort reports: the guilty one that was first comes first, ranks that merely lost a peer come last."""
    return sorted(reports, key=lambda one: (_GUILT[one.kind], one.time, one.rank))


def job_code(ordered: Sequence[RankReport]) -> int:
    """Return the exit code of a job of which these reports are known, the guilty one first; it is never success."""
    first = ordered[0]
    if first.kind in ("hung", "stopped"):
        return HANG_CODE
    return first.exit_code or 1


def shell_code(code: int) -> int:
    """Return an exit code of ``subprocess`` as a shell gives it: 128 + *n* for signal *n*."""
    return 128 - code if code < 0 else code


def describe_exit(code: int) -> str:
    """Say in words how a process has ended whose exit code ``subprocess`` gives as ``code``."""
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"
    return f"exit code {code}"


def write_report(path: str, report: RankReport, shown: str = "") -> None:
    """Write a report where torchelastic looks for one: in its form, which holds ours.

    Args:
        path: the file.
        report: what is known of this process.
        shown: what torchrun shows in its table, in the place of the traceback.
    """
    # torchrun blames the rank whose time is the earliest, and knows no parts of a second.
    seconds = int(report.time)
    if not report.is_guilty:
        seconds += _LATER_SECONDS
        shown = shown or first_line(report.message)
    extra = {"py_callstack": shown or report.trace, "timestamp": str(seconds)}
    message = {"message": report.message, "extraInfo": extra}
    content = {"message": message, "report": asdict(report)}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # The agent may kill this process while it writes; what it reads is whole.
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(part, path)


def read_report(path: str) -> RankReport | None:
    """Read what :func:`write_report` has written; None if another library's has."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    return from_dict(content["report"]) if "report" in content else None


def from_dict(values: dict[str, Any]) -> RankReport:
    """Make a report of what ``dataclasses.asdict`` gave, by this version or another."""
    known = {item.name for item in fields(RankReport)}
    return RankReport(**{name: values[name] for name in values.keys() & known})


def write_folder(error_file: str, folder: str) -> None:
    """Tell the agent where the log folder of a run is, beside the report that this process may write."""
    os.makedirs(os.path.dirname(error_file), exist_ok=True)
    with open(_folder_file(error_file), "w", encoding="utf-8") as file:
        json.dump(folder, file)


def read_folder(error_file: str) -> str:
    """Read what :func:`write_folder` has written; an empty text if nothing was."""
    with suppress(OSError, ValueError), open(_folder_file(error_file)) as file:
        return json.load(file)
    return ""


def _folder_file(error_file: str) -> str:
    return os.path.join(os.path.dirname(error_file), "log_folder.json")
