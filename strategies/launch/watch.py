"""Watching over processes from outside: one that is stopped, or stuck inside of C code, cannot say so itself.

Each process of a run writes a beat about once a second (see :mod:`~.heartbeat`). Where we are the agent, a thread of
the agent reads them (:func:`watching`); elsewhere, a small process beside each one does (:func:`main`), which imports
no torch. Whoever gives no beat for as long as its phase may stand still is asked for its stacks, reported, and killed.
What becomes of the job then is torchelastic's business, or the launcher's.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from glob import glob

from .rank_report import Kind, RankReport, write_report
from .stacks import STACKS_SIGNAL, native_stacks, readable
from .telling import tell

# How often to look.
_SECONDS = 0.5
# When a process has failed, another one that stands still for so long will not leave by itself.
_LEAVING_SECONDS = 5.0
# For which that does not hold: what they do may save the run's work.
_ENDING = ("checkpoint", "teardown")


@dataclass
class Beat:
    """A sign of life of a process.

    Attributes:
        number: it grows.
        pid: the process.
        rank: its rank.
        world_size: number of processes of its job.
        phase: of its run.
        place: of its run, in words.
        limit: how long it may give no further beat, in seconds.
        error_file: where torchelastic looks for what has become of it; empty without torchelastic.
        stacks_file: where it writes its stacks on a signal.
        log_folder: of its run; empty if it is not known.
    """

    number: int
    pid: int
    rank: int
    world_size: int
    phase: str
    place: str
    limit: float
    error_file: str
    stacks_file: str
    log_folder: str = ""

    def write(self, file: int) -> None:
        """Write it into an open file, in the place of the last one."""
        content = json.dumps(asdict(self)).encode()
        os.pwrite(file, content + b"\n", 0)

    @classmethod
    def read(cls, path: str) -> Beat | None:
        """Read one; None if there is none, or it is being written."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.loads(file.readline()))
        except (OSError, ValueError, TypeError):
            return None


def last_places(folder: str) -> dict[int, str]:
    """Return where each rank was when it gave its last beat in ``folder``, in words."""
    # Those of an earlier attempt come first.
    paths = sorted(glob(os.path.join(folder, "beat-*")), key=os.path.getmtime)
    beats = [beat for path in paths if (beat := Beat.read(path))]
    return {beat.rank: beat.place for beat in beats}


class _Watched:
    """A process, as it looks from outside.

    Args:
        path: of its beats.

    Attributes:
        beat: the last one.
        silent: for how long there was no further one, in seconds.
        still: for how long its place has been the same.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.beat: Beat | None = None
        self.silent = 0.0
        self.still = 0.0

    def look(self, elapsed: float) -> None:
        """Read its beat, ``elapsed`` seconds after the last time."""
        beat, last = Beat.read(self.path), self.beat
        if beat is None:
            return
        self.beat = beat
        self.silent += elapsed
        self.still += elapsed
        if last is None or last.place != beat.place:
            self.still = 0.0
        is_frozen = beat.world_size == 1 and self.state() == "T"
        # A debugger has stopped it, or, where nobody waits for it, its user.
        if (
            last is None
            or last.number != beat.number
            or self.state() == "t"
            or is_frozen
        ):
            self.silent = 0.0

    def state(self) -> str:
        """Its state as Linux says: "T" if it is stopped, "t" if a debugger has stopped it; empty if it has ended."""
        assert self.beat is not None
        try:
            with open(
                f"/proc/{self.beat.pid}/stat", encoding="utf-8", errors="replace"
            ) as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:
            return ""
        return "" if state in "ZX" else state

    @property
    def attempt(self) -> str:
        """Torchelastic's folder for the attempt at the job that it belongs to."""
        error_file = "" if self.beat is None else self.beat.error_file
        return os.path.dirname(os.path.dirname(error_file))

    def stays(self) -> bool:
        """Whether it will not leave by itself, now that another process has failed."""
        assert self.beat is not None
        still = 0.0 if self.beat.phase in _ENDING else self.still
        return max(self.silent, still) >= _LEAVING_SECONDS

    def has_failed(self) -> bool:
        """Whether it has ended inside of a run, or by an error that it has reported."""
        if self.beat is None or self.state():
            return False
        return os.path.exists(self.path) or os.path.exists(self.beat.error_file)


class Watch:
    """Watches over processes of this machine.

    Args:
        paths: gives the paths of their beats.
        prints: whether to print what is reported, as there is no agent that does.
    """

    def __init__(self, paths: Callable[[], Iterable[str]], prints: bool) -> None:
        self.paths = paths
        self.prints = prints
        self._watched: dict[str, _Watched] = {}

    def run(self, wait: Callable[[float], bool]) -> None:
        """Look again and again, until ``wait``, which waits for so many seconds, returns True."""
        looked = time.monotonic()
        while not wait(_SECONDS):
            now = time.monotonic()
            # If this process was stopped, or its machine slept, so did the others.
            self.look(min(now - looked, 2 * _SECONDS))
            looked = now

    def look(self, elapsed: float) -> None:
        """Look once, ``elapsed`` seconds after the last time."""
        for path in self.paths():
            self._watched.setdefault(path, _Watched(path))
        seen = [each for each in self._watched.values() if os.path.exists(each.path)]
        # Those of an attempt before, which has failed, are no peers of those that were started again.
        failed = {e.attempt for e in self._watched.values() if e.has_failed()}
        for each in seen:
            each.look(elapsed)
            beat = each.beat
            if beat is None or not each.state():
                continue
            if each.silent >= beat.limit:
                self._end(
                    beat,
                    "hung",
                    f"no sign of life for {each.silent:.0f} s: {_why(each)}",
                )
            elif each.attempt in failed and each.stays():
                self._end(
                    beat,
                    "stopped",
                    "it did not leave after another process had failed, and was killed",
                )

    def _end(self, beat: Beat, kind: Kind, message: str) -> None:
        """Report a process, and kill it."""
        report = RankReport(
            rank=beat.rank,
            kind=kind,
            place=beat.place,
            message=message,
            trace=_stacks_of(beat),
            exit_code=128 + signal.SIGKILL,
            host=socket.gethostname(),
            pid=beat.pid,
            time=time.time(),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
        is_known = kind == "stopped" and os.path.exists(beat.error_file)
        if self.prints:
            tell(report, beat.log_folder, dict, report.trace)
        elif not is_known:
            # The disk may be full, and even then the process has to end.
            with suppress(OSError):
                write_report(beat.error_file, report)
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)


def _why(process: _Watched) -> str:
    """Say why a process gives no sign of life."""
    if process.state() == "T":
        return "a signal has stopped it (SIGSTOP)"
    return "code in C keeps Python's lock (GIL), or does not return from the system"


def _stacks_of(beat: Beat) -> str:
    """Let a process write its stacks; return them, or as much as there is after three seconds."""
    native = native_stacks(beat.pid)
    dump = ""
    # To its main thread: any other one could leave that running meanwhile.
    kill_thread = getattr(ctypes.CDLL(None), "tgkill", lambda _, *args: os.kill(*args))
    with suppress(OSError), open(beat.stacks_file, "rb") as file:
        kill_thread(beat.pid, beat.pid, int(STACKS_SIGNAL))
        # A stopped process writes them when it goes on, before anything else.
        os.kill(beat.pid, signal.SIGCONT)
        for _ in range(300):
            time.sleep(0.01)
            more = file.read().decode(errors="replace")
            dump += more
            if dump and not more:
                break
    return "\n\n".join(filter(None, (readable(dump), native)))


@contextmanager
def watching(folder: str) -> Iterator[None]:
    """Return a context in which a thread of this process, the agent, watches over those whose beats are in a folder."""
    over = threading.Event()
    watch = Watch(lambda: glob(os.path.join(folder, "beat-*")), prints=False)
    thread = threading.Thread(
        target=watch.run, args=(over.wait,), name="loopwright-watch", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Watch over the one process, this one's parent, whose beats are in the file that the command line names.

    It ends when the parent does.
    """
    path = sys.argv[1]
    ends = select.poll()
    ends.register(os.pidfd_open(os.getppid()), select.POLLIN)
    Watch(lambda: [path], prints=True).run(
        lambda seconds: bool(ends.poll(1000 * seconds))
    )
