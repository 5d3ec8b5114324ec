"""Which process failed first, and what is told of it."""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from glob import glob
from types import FrameType
from typing import Any, NamedTuple

from .environment import AGENT, detect_environment
from .rendezvous import leave

# In messages of errors that only say that another process has gone, or is stuck.
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused) by peer|broken pipe", re.IGNORECASE
)


_PEER_FAILED = re.compile(r"rank \d+ could not save")


def join_job() -> None:
    """Make this process a good one among several: its errors are recorded, and it does not outlive its agent."""
    global _adopted, _previous_hook
    if _adopted:
        return
    _adopted = True
    _previous_hook = sys.excepthook
    sys.excepthook = _report_uncaught
    if AGENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with(int(os.environ.get(AGENT, os.getppid())))


def find_peers() -> frozenset[int]:
    """The processes that torchelastic has started beside this one, and itself; none where they cannot be told."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not os.path.exists("/proc/self/stat"):
        return frozenset()
    mine = _command(os.getpid())
    alive = (
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _runs_beside(int(name))
    )
    found = frozenset(process for process in alive if _command(process) == mine)
    # It may be started through a shell that stays between, or have changed its title.
    return (
        found
        if len(found) == int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        else frozenset()
    )


def one_is_gone(peers: frozenset[int]) -> bool:
    """Whether one of the processes has ended: then torchelastic ends the others by SIGTERM."""
    return not all(map(_runs_beside, peers))


def _runs_beside(process: int) -> bool:
    """Whether a process runs that this one's agent has started."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = (
                file.read().rpartition(")")[2].split()[:2]
            )  # behind the name, which may hold anything
    except OSError:
        return False
    return int(parent) == os.getppid() and state != "Z"


def process_here() -> tuple[str, int]:
    """This process, for :func:`has_ended`: its machine (or container), and its number there."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}", os.getpid()
    return "", os.getpid()


def has_ended(process: Sequence[Any] | None) -> bool:
    """Whether a process that :func:`process_here` told is known to have ended; on another machine, it is not."""
    machine, number = process or ("", 0)
    if not machine or machine != process_here()[0]:
        return False
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _command(process: int) -> bytes:
    """How a process was called, without the numbers, in which those that an agent starts may differ."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return re.sub(rb"\d", b"", file.read())
    except OSError:  # it has just ended
        return b""


def _die_with(agent: int) -> None:
    """Let the system kill this process when the agent dies (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != agent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)


_noted: tuple[int, str] | None = (
    None  # the id of an exception: to hold it would keep alive what its frames hold
)


def record_failure(error: BaseException, where: str) -> None:
    """Keep in mind how far a run had come when ``error`` ended it, should it end this process too."""
    global _noted
    _noted = id(error), where
    # Python has no hook for SystemExit; and when a peer is gone, the agent may end this process before the hook runs.
    if isinstance(error, SystemExit) or is_loss(error):
        with suppress(
            OSError
        ):  # such as a full disk: the run must end in order all the same
            report(error)
    if (
        isinstance(error, SystemExit)
        and _adopted
        and "TORCHELASTIC_ERROR_FILE" not in os.environ
    ):
        _print(f"{_headline(error)} SystemExit: {error}\n")


def clear_failure() -> None:
    """A run begins: what was noted of one before has not ended this process."""
    with suppress(OSError):
        os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def record_stop(where: str, frame: FrameType | None) -> None:
    """The agent ends this process as a peer has ended: keep in mind where it is, unless an error has been noted."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        told = "it was told to end, as another process had"
        with suppress(OSError):  # such as a full disk: it must end all the same
            _write_report(
                path,
                told,
                "".join(traceback.format_stack(frame)),
                where,
                lost=True,
                stopped=True,
            )


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is gone."""
    kind = type(error).__name__
    gone = isinstance(error, RuntimeError) and _PEER_LOST.search(f"{kind}: {error}")
    return bool(kind.startswith("Dist") or gone or _PEER_FAILED.match(str(error)))


def report(error: BaseException) -> None:
    """Write ``error`` to torchelastic's error file, if it started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        callstack = "".join(
            traceback.format_exception(type(error), error, error.__traceback__)
        )
        _write_report(
            path,
            f"{type(error).__name__}: {error}",
            callstack,
            _where(error),
            lost=is_loss(error),
        )


def _where(error: BaseException) -> str:
    """How far the run had come that ``error`` ended, if one has noted it."""
    return _noted[1] if _noted is not None and _noted[0] == id(error) else ""


def _headline(error: BaseException) -> str:
    """Which process ``error`` ends, and where."""
    environment = detect_environment()
    who = (
        "This process"
        if environment is None
        else f"Rank {environment.rank} of {environment.world_size}"
    )
    what = "lost its peers" if is_loss(error) else "failed"
    if isinstance(error, SystemExit) and not error.code:
        what = "ended"
    where = _where(error)
    return f"{who} {what} at {where}:" if where else f"{who} {what}:"


def _print(text: str) -> None:
    """Write to standard error at once, as other processes do."""
    # Not sys.stderr: torch's hook calls ours with another one there, which is written out only afterwards.
    if sys.__stderr__ is not None:
        sys.__stderr__.write(text)
        sys.__stderr__.flush()


def _write_report(
    path: str, message: str, callstack: str, where: str, **facts: bool
) -> None:
    now = time.time()
    extra = {"py_callstack": callstack, "timestamp": str(int(now))}
    content = {
        "message": {"message": message, "extraInfo": extra},
        "where": where,
        "time": now,
        **facts,
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(
        f"{path}.part", "w", encoding="utf-8"
    ) as file:  # this process may be ended meanwhile
        json.dump(content, file)
    os.replace(f"{path}.part", path)


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    report(error)
    if not isinstance(error, Exception):
        _previous_hook(kind, error, trace)
        return
    # With an agent of ours, it prints what all have reported, the guilty rank's first.
    if AGENT not in os.environ:
        with redirect_stderr(io.StringIO()) as text:
            _previous_hook(kind, error, trace)
        _print(f"{_headline(error)}\n{text.getvalue()}")
    # `leave` might wait for peers; and without it, the end of the interpreter is not safe.
    atexit.unregister(leave)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


_adopted = False


_previous_hook = sys.excepthook


class _Ended(NamedTuple):
    """How a rank has ended; those sort first that are guilty, and then those that ended earlier."""

    lost_peers: bool
    time: float
    rank: int
    text: str


def failure_text(
    failures: Mapping[int, Any], folder: str, processes: int
) -> tuple[str, int, int]:
    """What failed, in the order of guilt: those that merely lost a peer come last.

    Args:
        failures: of the agent, by rank.
        folder: where the ranks have written their reports.
        processes: how many ranks there are.

    Returns:
        The text, and the exit code and rank of the first.
    """
    # By SIGTERM the agent ends those that are left; if there is nothing else, the first had it from elsewhere.
    own = {
        rank: failure
        for rank, failure in failures.items()
        if failure.exitcode != -signal.SIGTERM
    }
    own = own or dict([min(failures.items(), key=lambda item: item[1].timestamp)])
    ended, stopped = _read_reports(folder, processes)
    reported = {entry.rank for entry in ended}
    for rank, failure in own.items():
        if rank not in reported:
            how = (
                f"exit code {failure.exitcode}"
                if failure.exitcode >= 0
                else f"{failure.signal_name()}"
            )
            ended.append(
                _Ended(
                    False,
                    failure.timestamp,
                    rank,
                    f"Rank {rank} of {processes} ended with {how}",
                )
            )
    ended.sort()
    if all(entry.lost_peers for entry in ended):  # to one that hung
        silent = dict.fromkeys(
            sorted(set(range(processes)) - reported),
            "did not answer: it hung, or had ended",
        )
        hung = [
            _Ended(True, 0.0, rank, f"Rank {rank} of {processes} {how}")
            for rank, how in {**silent, **dict(sorted(stopped.items()))}.items()
        ]
        ended = hung + [entry for entry in ended if entry.rank not in stopped]
    code = next(own[entry.rank].exitcode for entry in ended if entry.rank in own)
    text = "\n\n".join(entry.text for entry in ended)
    return text, _as_exit_code(code), ended[0].rank


def _as_exit_code(code: int) -> int:
    """What a shell would say: 128 + the number for a signal, and never success."""
    if code < 0:
        return 128 - code
    return code or 1


def _read_reports(folder: str, processes: int) -> tuple[list[_Ended], dict[int, str]]:
    """How the ranks of the last attempt say that they ended; and of those that had noticed nothing, where they were."""
    ended: list[_Ended] = []
    stopped: dict[int, str] = {}
    attempts = sorted(
        glob(os.path.join(folder, "*", "attempt_*")),
        key=lambda path: int(path.rpartition("_")[2]),
    )
    for path in glob(os.path.join(attempts[-1], "*", "error.json")) if attempts else ():
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rank, extra = (
            int(os.path.basename(os.path.dirname(path))),
            content["message"]["extraInfo"],
        )
        at = f" at {content['where']}" if content.get("where") else ""
        stack = extra["py_callstack"].rstrip()
        if content.get("stopped"):
            stopped[rank] = f"was still running when it was stopped{at}:\n{stack}"
        lost_peers = bool(content.get("lost"))
        text = f"Rank {rank} of {processes} failed{at}:\n{stack}"
        if lost_peers:
            text = f"Rank {rank} of {processes} lost its peers{at}: {content['message']['message']}"
        ended.append(
            _Ended(
                lost_peers, float(content.get("time", extra["timestamp"])), rank, text
            )
        )
    return ended, stopped
