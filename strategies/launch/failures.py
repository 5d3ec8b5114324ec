"""What a process of a job tells of its failure: to the agent that started it, or on standard error."""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import sys
import time
import traceback
from contextlib import redirect_stderr, suppress
from types import FrameType
from typing import Any

from .environment import AGENT, detect_environment
from .processes import die_with
from .rendezvous import RENDEZVOUS

# In messages of errors that only say that another process has gone, or is stuck.
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused) by peer|broken pipe", re.IGNORECASE
)
_PEER_FAILED = re.compile(r"rank \d+ could not save")


class _Worker:
    """What this process, as one of a job, keeps in mind.

    Attributes:
        has_joined: :func:`join_job` has been called.
        previous_hook: ``sys.excepthook`` before that.
        failure_id: the ``id`` of an exception that ended a run: to hold it would keep alive what its frames hold.
        where: how far that run had come.
    """

    has_joined = False
    previous_hook: Any = sys.excepthook
    failure_id = 0
    where = ""


_worker = _Worker()


def join_job() -> None:
    """Make this process a good one among several: its errors are recorded, and it does not outlive its agent."""
    if _worker.has_joined:
        return
    _worker.has_joined = True
    _worker.previous_hook = sys.excepthook
    sys.excepthook = _report_uncaught
    if AGENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(int(os.environ.get(AGENT, os.getppid())))


def record_failure(error: BaseException, where: str) -> None:
    """Keep in mind how far a run had come when an exception ended it, should it end this process too.

    Args:
        error: the exception.
        where: in words, such as "epoch 1, batch 3".
    """
    _worker.failure_id = id(error)
    _worker.where = where
    is_exit = isinstance(error, SystemExit)
    # Python has no hook for SystemExit; and when a peer is gone, the agent may end this process before the hook runs.
    if is_exit or is_loss(error):
        # The disk may be full: the run must end in order all the same.
        with suppress(OSError):
            report(error)
    has_agent = "TORCHELASTIC_ERROR_FILE" in os.environ
    if is_exit and _worker.has_joined and not has_agent:
        _print(f"{_headline(error)} SystemExit: {error}\n")


def clear_failure() -> None:
    """A run begins: what was recorded of one before has not ended this process."""
    with suppress(OSError):
        os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def record_stop(where: str, frame: FrameType | None) -> None:
    """The agent ends this process as a peer has ended: report where it is, unless it has reported an error.

    Args:
        where: how far its run has come, in words.
        frame: what it runs.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    message = "it was told to end, as another process had"
    stack = "".join(traceback.format_stack(frame))
    # The disk may be full: it must end all the same.
    with suppress(OSError):
        _write_report(path, message, stack, where, lost=True, stopped=True)


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is gone."""
    kind = type(error).__name__
    if kind.startswith("Dist") or _PEER_FAILED.match(str(error)):
        return True
    text = f"{kind}: {error}"
    return isinstance(error, RuntimeError) and _PEER_LOST.search(text) is not None


def report(error: BaseException) -> None:
    """Write ``error`` to torchelastic's error file, if it started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = f"{type(error).__name__}: {error}"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    stack = "".join(lines)
    _write_report(path, message, stack, _where(error), lost=is_loss(error))


def _where(error: BaseException) -> str:
    """Return how far the run had come that ``error`` ended; empty if none has recorded it."""
    return _worker.where if _worker.failure_id == id(error) else ""


def _headline(error: BaseException) -> str:
    """Return in words which process ``error`` ends, and where."""
    environment = detect_environment()
    who = "This process"
    if environment is not None:
        who = f"Rank {environment.rank} of {environment.world_size}"
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
    path: str,
    message: str,
    stack: str,
    where: str,
    **facts: bool,
) -> None:
    now = time.time()
    extra = {"py_callstack": stack, "timestamp": str(int(now))}
    content = {
        "message": {"message": message, "extraInfo": extra},
        "where": where,
        "time": now,
        **facts,
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # This process may be ended meanwhile.
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(part, path)


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """Tell of an exception that ends this process, and end it without waiting for anybody: ``sys.excepthook``."""
    report(error)
    if not isinstance(error, Exception):
        _worker.previous_hook(kind, error, trace)
        return
    # An agent of ours prints what all have reported, the guilty rank's first.
    if AGENT not in os.environ:
        with redirect_stderr(io.StringIO()) as text:
            _worker.previous_hook(kind, error, trace)
        _print(f"{_headline(error)}\n{text.getvalue()}")
    # To leave the job might wait for peers; and without it, the end of the interpreter is not safe.
    atexit.unregister(RENDEZVOUS.leave_job)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
