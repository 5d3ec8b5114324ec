"""A thread in each process of a run, which looks about once a second whether the run moves.

It samples the functions that the run's thread is in, and from them the place of the run, so that the run itself pays
nothing. If that thread stands still for longer than ``hang_timeout`` allows, and does not merely wait for other
processes in a collective, it is reported with all its stacks, and this process ends. What ends the other processes, or
starts all of them again, is then what it is for any process that fails.

A process that is stopped, or in which C code keeps Python's lock, cannot run this thread either. So each look leaves a
beat, which somebody outside reads: see :mod:`~.watch`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any

from .environment import AGENT, BEATS, restart_count
from .failures import noted_folder, own_report, tell_end
from .hang_timeout import MOST_SECONDS, HangTimeout
from .peers import note_place
from .rank_report import HANG_CODE
from .rendezvous import RENDEZVOUS
from .stacks import (
    all_stacks,
    frames_of,
    is_debugged,
    native_stacks,
    serving_stacks,
    waits_for_peers,
)
from .stragglers import Stragglers
from .watch import Beat

# The newest run of each thread: a run may be made in a hook of another one, and only that is watched then.
_newest: dict[int, Heartbeat] = {}


class Heartbeat:
    """Watches the run of the thread that makes it, from :meth:`begin` to :meth:`end`, or as a context.

    Args:
        timeout: how long the run may stand still.
        place: gives the phase and the place of the run whose functions these frames run, the outermost first.
        counters: gives numbers that change when the run goes on.
        rank: this process's.
        world_size: number of processes of the job.
    """

    def __init__(
        self,
        timeout: HangTimeout,
        place: Callable[[list[FrameType]], tuple[str, str]],
        counters: Callable[[], Any],
        rank: int,
        world_size: int,
    ) -> None:
        self.timeout = timeout
        self.place = place
        self.counters = counters
        self.rank = rank
        self.world_size = world_size
        self._thread_id = threading.get_ident()
        self._outer = _newest.get(self._thread_id)
        self._stragglers = Stragglers(rank, world_size, _shared_store)
        self._watches = threading.Event()
        self._over = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, name="loopwright-heartbeat", daemon=True
        )

    def begin(self) -> None:
        """Watch from now on."""
        if not self.timeout.is_off:
            _newest[self._thread_id] = self
            self._watcher.start()
            self._watches.wait()

    def end(self) -> None:
        """Watch no longer."""
        if self.timeout.is_off:
            return
        self._over.set()
        self._watcher.join()
        _newest.pop(self._thread_id, None)
        if self._outer is not None:
            _newest[self._thread_id] = self._outer

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: Any) -> None:
        self.end()

    def _watch(self) -> None:
        interval = self.timeout.interval()
        moves = Moves(self.timeout)
        if interval == MOST_SECONDS:
            # Short runs do not pay for a watch that takes minutes to notice anything.
            self._watches.set()
            if self._over.wait(interval):
                return
        with ExitStack() as stack:
            beats = _Beats(self.rank, self.world_size)
            # A run outside of this one gives signs of life already. And no run fails as it cannot be watched.
            if self._outer is None:
                with suppress(OSError):
                    stack.enter_context(beats.opened())
            beats.write(moves)
            self._watches.set()
            looked = time.monotonic()
            while not self._over.wait(interval):
                now = time.monotonic()
                # While a process is stopped, or its machine sleeps, the clock may go on: that does not count.
                elapsed = min(now - looked, 2 * interval)
                looked = now
                self._look(moves, elapsed)
                beats.write(moves)
                if moves.still >= moves.limit:
                    self._report(moves)

    def _look(self, moves: Moves, elapsed: float) -> None:
        """Look where the run is, ``elapsed`` seconds after the last time."""
        # No longer than this function, as they keep alive what their functions hold.
        frames = frames_of(self._thread_id)
        phase, place = self.place(frames)
        # Imports take long where many processes read from one disk.
        counters = (self.counters(), len(sys.modules))
        waits = waits_for_peers(frames)
        moves.note(phase, place, counters, waits, elapsed)
        is_newest = _newest.get(self._thread_id) is self
        if not is_newest or is_debugged(frames):
            moves.forget()
        elif phase == "train":
            self._stragglers.note(place, waits)

    def _report(self, moves: Moves) -> None:
        """Report that the run stands still, and end this process."""
        stacks = all_stacks(self._thread_id), native_stacks(os.getpid())
        report = own_report(
            "lost" if moves.waits else "hung",
            moves.place,
            moves.describe(),
            "\n".join(filter(None, stacks)),
        )
        began = report.time - moves.still
        report = replace(report, rank=self.rank, exit_code=HANG_CODE, time=began)
        tell_end(report, report.trace)
        # What hangs may be in the middle of a print.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(HANG_CODE)


class Moves:
    """How long a run has stood still.

    Args:
        timeout: how long it may.

    Attributes:
        still: for how long its thread has been where it is, in seconds.
        waits: whether it waits there for other processes.
        limit: how long it may be there.
        phase: of the run.
        place: of the run, in words.
    """

    def __init__(self, timeout: HangTimeout) -> None:
        self.timeout = timeout
        self.still = 0.0
        self.waits = False
        self.limit = timeout.seconds["setup"]
        self.phase = "setup"
        self.place = "the beginning"
        self._at: Any = None
        # By phase, the longest time that it has stood still before it went on.
        self._longest: dict[str, float] = {}

    def note(
        self, phase: str, place: str, counters: Any, waits: bool, elapsed: float
    ) -> None:
        """Note where the run is, ``elapsed`` seconds after the last time.

        Args:
            phase: its phase.
            place: in words.
            counters: numbers that change when it goes on.
            waits: whether it waits for other processes.
            elapsed: in seconds.
        """
        self.phase, last = phase, self.phase
        self.place = place
        at = (phase, place, counters, waits)
        if at == self._at:
            self.still += elapsed
            return
        if not self.waits:
            self._longest[last] = max(self.still, self._longest.get(last, 0.0))
        self.still = 0.0
        self._at = at
        self.waits = waits
        self.limit = self.timeout.limit(phase, self._longest.get(phase, 0.0))
        if waits:
            self.limit = self.timeout.limit_of_waiting()

    def forget(self) -> None:
        """Begin again: for now, it is not to be seen whether the run moves."""
        self._at = None
        self.still = 0.0

    def describe(self) -> str:
        """Say that the run stands still."""
        if self.waits:
            return f"waited {self.still:.0f} s for the other processes in a collective, without end"
        return f"did not move for {self.still:.0f} s ({self.phase}; see hang_timeout)"


def _shared_store() -> Any:
    """Return the store of the job on a connection of its own; None outside of a process group."""
    # The time-out is short, as a look at the run must not wait for a store that does not answer.
    return RENDEZVOUS.side_store("heartbeat", timedelta(seconds=3))


class _Beats:
    """Writes beats, once it is open.

    Args:
        rank: this process's.
        world_size: number of processes of the job.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._file: int | None = None
        self._number = 0
        self._facts: dict[str, Any] = {
            "pid": os.getpid(),
            "rank": rank,
            "world_size": world_size,
            "attempt": restart_count(),
            "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE", ""),
        }

    def write(self, moves: Moves) -> None:
        """Write that this process is alive, and where its run is."""
        if self._file is None:
            return
        self._number += 1
        beat = Beat(
            number=self._number,
            phase=moves.phase,
            place=moves.place,
            limit=moves.timeout.limit(moves.phase),
            log_folder=noted_folder(),
            **self._facts,
        )
        with suppress(OSError):
            beat.write(self._file)
        note_place(moves.place)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Return a context in which beats are read by somebody outside; only Linux tells enough of a process for it.

        Raises:
            OSError: if there is no room for them.
        """
        if sys.platform != "linux":
            yield
            return
        pid = os.getpid()
        names = ("beat", "stacks")
        with ExitStack() as stack:
            # Of an agent of ours, which then reads the beats.
            is_child = os.environ.get(AGENT) == str(os.getppid())
            if is_child and BEATS in os.environ:
                number = threading.get_native_id()
                paths = [
                    os.path.join(os.environ[BEATS], f"{name}-{pid}-{number}")
                    for name in names
                ]
                files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
                for path in paths:
                    stack.callback(_remove, path)
            else:
                files = [os.memfd_create(f"loopwright-{name}") for name in names]
                paths = [f"/proc/{pid}/fd/{file}" for file in files]
                stack.enter_context(_watcher(paths[0]))
            for file in files:
                stack.callback(os.close, file)
            stack.enter_context(serving_stacks(files[1]))
            self._file = files[0]
            self._facts["stacks_file"] = paths[1]
            yield


def _remove(path: str) -> None:
    with suppress(OSError):
        os.remove(path)


@contextmanager
def _watcher(path: str) -> Iterator[None]:
    """Return a context with a small process that reads this one's beats, as there is no agent of ours."""
    package, name = os.path.split(os.path.dirname(__file__))
    program = f"import sys; sys.path.append({package!r}); from {name}.watch import main; main()"
    command = [sys.executable, "-I", "-S", "-c", program, path]
    try:
        # In a session of its own, it is not interrupted from the terminal.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        # There is no Python to start, as where it is embedded: then this thread watches alone.
        yield
        return
    try:
        yield
    finally:
        process.kill()
        process.wait()
