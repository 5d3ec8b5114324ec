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

# Stands in messages of errors that only say that another process is gone, or stuck.
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused) by peer|broken pipe", re.IGNORECASE
)
_PEER_FAILED = re.compile(r"rank \d+ could not save")


class _Worker:
    """What this process remembers as one of a job.

    Attributes:
        has_joined: :func:`join_job` has been called.
        previous_hook: ``sys.excepthook`` before that.
        failure_id: the ``id`` of the exception that ended the last failed run. The exception itself would keep alive
            what its frames hold.
        where: how far that run had come, in words.
    """

    has_joined = False
    previous_hook: Any = sys.excepthook
    failure_id = 0
    where = ""


_worker = _Worker()


def join_job() -> None:
    """Let this process record its errors for the job, and end with the agent that started it."""
    if _worker.has_joined:
        return
    _worker.has_joined = True
    _worker.previous_hook = sys.excepthook
    sys.excepthook = _report_uncaught
    if AGENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(int(os.environ.get(AGENT, os.getppid())))


def record_failure(error: BaseException, where: str) -> None:
    """Remember how far a run had come when an exception ended it, in case that it ends this process, too.

    Args:
        error: the exception.
        where: in words, such as "epoch 1, batch 3".
    """
    _worker.failure_id = id(error)
    _worker.where = where
    is_exit = isinstance(error, SystemExit)
    # sys.excepthook is not called for SystemExit. And when a peer is gone, the agent may end this process before the
    # hook runs. So these are reported now.
    if is_exit or is_loss(error):
        # The disk may be full, and even then the run has to be torn down.
        with suppress(OSError):
            report(error)
    has_agent = "TORCHELASTIC_ERROR_FILE" in os.environ
    if is_exit and _worker.has_joined and not has_agent:
        _print(f"{_headline(error)} SystemExit: {error}\n")


def clear_failure() -> None:
    """Remove the report of an earlier run, as a run begins: that failure has not ended this process."""
    with suppress(OSError):
        os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def record_stop(where: str, frame: FrameType | None) -> None:
    """Report where this process is when the agent stops it, as a peer has ended; an error that it has reported stays.

    Args:
        where: how far its run has come, in words.
        frame: what it runs.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    message = "it was told to end, as another process had"
    stack = "".join(traceback.format_stack(frame))
    # The disk may be full, and even then this process has to end.
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
    # The agent may kill this process while it writes; what it reads is whole.
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(part, path)


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """Report an exception that nobody has caught, as ``sys.excepthook``, and end this process without its peers."""
    report(error)
    if not isinstance(error, Exception):
        _worker.previous_hook(kind, error, trace)
        return
    # An agent of ours prints what all have reported, the guilty rank's first.
    if AGENT not in os.environ:
        with redirect_stderr(io.StringIO()) as text:
            _worker.previous_hook(kind, error, trace)
        _print(f"{_headline(error)}\n{text.getvalue()}")
    # To leave the job could take peers, and an interpreter that ends without that may be aborted by gloo's threads. So
    # only the other functions of atexit are run, and the process ends at once.
    atexit.unregister(RENDEZVOUS.leave_job)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
