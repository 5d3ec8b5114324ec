"""What a process of a job tells of its failure: to the agent that started it, or on standard error."""

from __future__ import annotations

import atexit
import io
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from types import FrameType, MappingProxyType, TracebackType
from typing import Any, NamedTuple

from .environment import AGENT, BEATS, detect_environment, restart_count
from .job_folder import keep_sockets_in
from .peers import Peer
from .processes import die_with
from .rank_report import (
    Kind,
    RankReport,
    describe_exit,
    shell_code,
    write_folder,
    write_report,
)
from .rendezvous import RENDEZVOUS
from .stacks import frames_until, last_collective
from .telling import error_file, has_own_agent, tell

# Stands in messages of errors that only say that another process is gone, or stuck.
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused) by peer|broken pipe", re.IGNORECASE
)
_PEER_FAILED = re.compile(r"rank \d+(, \d+)* (could not save|departs? from)")


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        phase: ``"setup"``, ``"prepare_data"``, ``"train"``, ``"validate"``, ``"test"``, ``"predict"``,
            ``"checkpoint"`` or ``"teardown"``; empty outside of a run.
        text: in words, such as "epoch 1, batch 3, global step 8, in training_step of Net".
    """

    phase: str = ""
    text: str = ""


# Says where a run is whose functions these frames run, the outermost first.
Describe = Callable[[list[FrameType]], Place]


class _Worker:
    """What this process remembers as one of a job.

    Attributes:
        has_joined: :func:`join_job` has been called.
        has_hook: ``sys.excepthook`` is one of this file's.
        previous_hook: what it was before that.
        failure_id: the ``id`` of the exception that ended the last failed run. The exception itself would keep alive
            what its frames hold.
        place: how far that run had come, in words.
        describe: says where the run is that is going on.
        folder: gives the log folder of the newest run; an empty text if it writes no files.
        noted_folder: the same, where it is known.
        peers: the processes of the job on this machine, by rank.
    """

    has_joined = False
    has_hook = False
    previous_hook: Any = sys.excepthook
    failure_id = 0
    place = ""
    describe: Describe | None = None
    folder: Callable[[], str] = str
    noted_folder = ""
    peers: Mapping[int, Peer] = MappingProxyType({})


_worker = _Worker()


def join_job() -> None:
    """Let this process record its errors for the job, and end with the agent that started it."""
    if _worker.has_joined:
        return
    _worker.has_joined = True
    _install_hook(_report_uncaught)
    if AGENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(int(os.environ.get(AGENT, os.getppid())))
    if has_own_agent():
        with suppress(OSError):
            keep_sockets_in(os.environ[BEATS])


def _install_hook(hook: Any) -> None:
    if not _worker.has_hook:
        _worker.previous_hook = sys.excepthook
    _worker.has_hook = True
    sys.excepthook = hook


def note_peers(peers: Mapping[int, Peer]) -> None:
    """Note the processes of the job on this machine, by rank."""
    _worker.peers = peers


def has_ended(rank: int) -> bool:
    """Whether the process of a rank is known to have ended; on another machine, it is not."""
    peer = _worker.peers.get(rank)
    return peer is not None and peer.has_ended()


# The run that is going on.


def begin_run(describe: Describe) -> Describe | None:
    """Note that a run begins. If an earlier one has failed, that has not ended this process.

    Args:
        describe: knows where it is.

    Returns:
        The same of the run inside of which this one begins, if there is one; for :func:`end_run`.
    """
    outer = _worker.describe
    _worker.describe = describe
    with suppress(OSError):
        os.remove(error_file())
    return outer


def end_run(outer: Describe | None) -> None:
    """Note that the run is over, and the one goes on inside of which it was."""
    _worker.describe = outer


def note_folder(folder: Callable[[], str]) -> None:
    """Note where the newest run's log folder is, in which its failure is told.

    Args:
        folder: gives it; an empty text if the run writes no files.
    """
    _worker.folder = folder
    if not _worker.has_joined:
        return
    # Others tell it if this process cannot.
    path = folder()
    _worker.folder = lambda: path
    _worker.noted_folder = path
    if has_own_agent():
        with suppress(OSError):
            write_folder(error_file(), path)


def noted_folder() -> str:
    """Return the log folder of the newest run for who watches this process; empty if it is not known without asking."""
    return _worker.noted_folder


def _describe(frames: list[FrameType]) -> Place:
    return Place() if _worker.describe is None else _worker.describe(frames)


def _frames_of(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


# How it ends.


def record_failure(error: BaseException) -> None:
    """Remember where a run was when an exception ended it, in case that it ends this process, too."""
    _worker.failure_id = id(error)
    _worker.place = _describe([*_frames_of(error.__traceback__)]).text
    if not _worker.has_hook:
        # Only now, as a run that goes well needs none.
        _install_hook(_note_uncaught)
    # sys.excepthook is not called for SystemExit. And when a peer is gone, who started this process may end it before
    # the hook runs. So these are reported now.
    if isinstance(error, SystemExit):
        _tell_of_exit(report_of(error))
    elif is_loss(error) and any(map(has_ended, _worker.peers)):
        tell_end(report_of(error))
    elif is_loss(error):
        # The disk may be full, and even then the run has to be torn down.
        with suppress(OSError):
            report(error)


def _tell_of_exit(own: RankReport) -> None:
    """Tell that this process leaves in the middle of a run; alone, it may do so by an exit code of 0."""
    if _worker.has_joined:
        tell_end(own, own.trace)
    elif own.exit_code:
        tell_end(own)


def record_stop(frame: FrameType | None) -> None:
    """Report where this process is when the agent stops it, as a peer has ended; an error that it has reported stays.

    Args:
        frame: what it runs.
    """
    if error_file() and not os.path.exists(error_file()):
        stack = "".join(traceback.format_stack(frame)) + last_collective()
        message = "it was told to end, as another process had"
        place = _describe(frames_until(frame)).text
        tell_end(own_report("stopped", place, message, stack))


def record_end_by_signal(number: int) -> None:
    """Report that this process ends as a signal has asked it to."""
    if error_file():
        # The disk may be full, and even then this process has to end.
        with suppress(OSError):
            own = own_report("asked", "", describe_exit(-number), "")
            # The agent may end this process before it has left: another one that was asked is quicker.
            own = replace(own, exit_code=shell_code(-number))
            write_report(error_file(), own)


def tell_end(own: RankReport, trace: str | None = None) -> None:
    """Tell how this process ends, which another part of it may know better than the run.

    Args:
        own: what is known of it.
        trace: what to show of it, if there is no agent of ours; None shows nothing, an empty text a line.
    """
    folder = ""
    # A logger may have lost its service.
    with suppress(Exception):
        folder = _worker.folder()
    tell(own, folder, _worker.peers, trace)


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is gone."""
    kind = type(error).__name__
    text = message_of(error)
    if kind.startswith("Dist") or _PEER_FAILED.match(text.partition(": ")[2]):
        return True
    return isinstance(error, RuntimeError) and _PEER_LOST.search(text) is not None


def report(error: BaseException) -> None:
    """Write ``error`` to torchelastic's error file, if it started this process."""
    if error_file():
        write_report(error_file(), report_of(error))


def report_of(error: BaseException) -> RankReport:
    """Return what is known of this process that ``error`` ends."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    kind = "failed"
    message = message_of(error)
    exit_code = _exit_code(error)
    if is_loss(error):
        kind = "lost"
        lines.append(last_collective())
    elif exit_code == 0:
        kind = "ended"
        message = "exit code 0 before the run was over"
    place = _worker.place if _worker.failure_id == id(error) else ""
    own = own_report(kind, place, message, "".join(lines))
    return replace(own, exit_code=exit_code)


def own_report(kind: Kind, place: str, message: str, trace: str) -> RankReport:
    """Return a report of this process; see :class:`~.rank_report.RankReport`."""
    environment = detect_environment()
    return RankReport(
        rank=0 if environment is None else environment.rank,
        kind=kind,
        place=place,
        message=message,
        trace=trace,
        host=socket.gethostname(),
        pid=os.getpid(),
        time=time.time(),
        attempt=restart_count(),
    )


def message_of(error: BaseException) -> str:
    """Return an exception in words, whatever its class does when it is asked for them."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}: <its text cannot be had>"


def _exit_code(error: BaseException) -> int:
    """Return the exit code with which ``error`` ends a process."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _note_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Tell in the failure files of an exception that ends a process without peers, as ``sys.excepthook``."""
    _worker.previous_hook(kind, error, trace)
    if isinstance(error, Exception):
        tell_end(report_of(error))


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """Report an exception that nobody has caught, as ``sys.excepthook``, and end this process without its peers."""
    if not isinstance(error, Exception):
        with suppress(OSError):
            report(error)
        _worker.previous_hook(kind, error, trace)
        return
    shown = None
    # An agent of ours prints what all have reported, the guilty rank's first.
    if not has_own_agent():
        with redirect_stderr(io.StringIO()) as text:
            _worker.previous_hook(kind, error, trace)
        shown = text.getvalue()
    tell_end(report_of(error), shown)
    # To leave the job could take peers, and an interpreter that ends without that may be aborted by gloo's threads. So
    # only the other functions of atexit are run, and the process ends at once.
    atexit.unregister(RENDEZVOUS.leave_job)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
