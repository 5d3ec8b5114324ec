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

from .processes import status_of
from .rank_report import HANG_CODE, RankReport, write_report
from .stacks import STACKS_SIGNAL, hook_in, native_stacks, readable
from .telling import tell

# How often to look.
_SECONDS = 0.5


@dataclass
class Beat:
    """A sign of life of a process.

    Attributes:
        number: it grows.
        pid: the process.
        rank: its rank.
        world_size: number of processes of its job.
        attempt: how often the job had been restarted.
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
    attempt: int
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
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.beat: Beat | None = None
        self.silent = 0.0

    def look(self, elapsed: float) -> None:
        """Read its beat, ``elapsed`` seconds after the last time."""
        beat = Beat.read(self.path)
        last = self.beat
        if beat is None:
            return
        self.beat = beat
        self.silent += elapsed
        state = self.state()
        has_moved = last is None or last.number != beat.number
        # A debugger has stopped it, or, where no other process waits for it, its user.
        is_frozen = state == "t" or (state == "T" and beat.world_size == 1)
        if has_moved or is_frozen:
            self.silent = 0.0

    def state(self) -> str:
        """Its state as Linux says: "T" if it is stopped, "t" if a debugger has stopped it; empty if it has ended."""
        if self.beat is None:
            return ""
        try:
            state = status_of(self.beat.pid)[0]
        except OSError:
            return ""
        return "" if state in "ZX" else state


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
        for path, process in self._watched.items():
            process.look(elapsed)
            beat = process.beat
            lives = os.path.exists(path) and process.state()
            if beat is not None and lives and process.silent >= beat.limit:
                self._end(process, beat)

    def _end(self, process: _Watched, beat: Beat) -> None:
        """Report a process that gives no sign of life, and kill it."""
        # Before it is asked for its stacks, for which it has to go on.
        why = _why(process)
        stacks = _stacks_of(beat)
        place = beat.place
        hook = hook_in(stacks)
        if hook not in place:
            # It has gone on since its last sign of life.
            place = f"{place.partition(', in ')[0]}, in {hook}"
        report = RankReport(
            rank=beat.rank,
            kind="hung",
            place=place,
            message=f"no sign of life for {process.silent:.0f} s: {why}",
            trace=stacks,
            exit_code=HANG_CODE,
            host=socket.gethostname(),
            pid=beat.pid,
            time=time.time() - process.silent,
            attempt=beat.attempt,
        )
        if self.prints:
            tell(report, beat.log_folder, {}, report.trace)
        else:
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
