"""Signals that ask a training to end: noted while it runs, and acted upon where the loop has finished a window.

They often go to all processes of a job, a loader's workers among them, which must live until the window is finished.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ...strategies.launch.launcher import find_peers, note_stop, one_is_gone

if TYPE_CHECKING:
    from ..loop.consensus import Control
    from ..loop.state import RunState

_HINT = b"\nInterrupted: the step is finished and a checkpoint saved. Once more ends at once.\n"

# What ends a job: the system's or a scheduler's request, SLURM's and others' warning ahead of it, and Ctrl-C.
_DEFAULTS: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}

_noting = mmap.mmap(-1, 1)  # how many runs only note signals now: seen by the processes that are forked, too
_counting = threading.Lock()  # runs in several threads begin and end at once


class Signals:
    """From :meth:`begin` to :meth:`end`, SIGTERM, SIGUSR1 and Ctrl-C are only noted; a second Ctrl-C raises at once.

    A signal for which the program has a handler of its own is left to it.

    Args:
        control: where they are noted.
        state: how far the run has come.
        is_main: whether this process tells the user.
    """

    def __init__(self, control: Control, state: RunState, is_main: bool) -> None:
        self.control, self.state, self.is_main = control, state, is_main
        self._process = os.getpid()
        self._peers: frozenset[int] = frozenset()
        self._set: list[int] = []
        self._notes = False
        self.in_a_hurry = False

    def begin(self) -> None:
        """Note signals from now on."""
        self._peers = find_peers()
        self._note_from_now_on(True)
        if threading.current_thread() is threading.main_thread():  # only there Python sets handlers
            for number, default in _DEFAULTS.items():
                if signal.getsignal(number) is default:
                    signal.signal(number, self._note)
                    self._set.append(number)

    def end(self) -> None:
        """Let signals do what they did before."""
        self._note_from_now_on(False)
        for number in self._set:
            signal.signal(number, _DEFAULTS[number])
        self._set = []

    def _note_from_now_on(self, notes: bool) -> None:
        with _counting:
            _noting[0] += notes - self._notes
            self._notes = notes

    def send_again(self) -> None:
        """Send once more what was noted, and not acted upon."""
        if self.control.wants_signal:
            os.kill(self._process, self.control.wants_signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork that has inherited this
            _note_in_worker(number, frame)
            return
        if number == signal.SIGTERM and one_is_gone(self._peers):  # what the loop would wait for does not come
            note_stop(self.state.where, frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
            return
        # torchelastic's agent turns a second Ctrl-C into SIGTERM.
        if self.control.wants_signal == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            self.in_a_hurry = True
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.is_main:
            os.write(2, _HINT)  # which, unlike print, may interrupt anything
        self.control.note_signal(number)


def _note_in_worker(number: int, frame: FrameType | None) -> None:
    if not _noting[0]:
        # torch ends its workers by SIGTERM, which is no error.
        os._exit(0 if number == signal.SIGTERM else 128 + number)


class _ProtectedInit:
    """A loader's ``worker_init_fn`` that lets signals pass while they are only noted in the main process.

    Until it has been called, they wait: between torch's own handlers and this, SIGTERM would end the worker.
    """

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, worker_id: int) -> None:
        for number in _DEFAULTS:
            signal.signal(number, _note_in_worker)  # in place of torch's own, which ends the worker at SIGTERM
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEFAULTS)  # see `workers_protected`
        if self.function is not None:
            self.function(worker_id)


def _wait_for_other_threads() -> None:
    """Wait until no thread of a library is running, but for half a second at most.

    A fork copies locks as they are, and what another thread holds at that moment nobody releases in the child. After a
    collective, a thread of torch.distributed enters Python to drop its tensors. Before 3.10.15 and 3.11.10, a child
    that is forked meanwhile can wait for a lock of Python's for ever: https://github.com/python/cpython/issues/112275.
    Python's own threads are no danger: they take that lock only while they hold the interpreter's, which is ours now.
    """
    pythons = {str(thread.native_id) for thread in threading.enumerate()}
    deadline = time.monotonic() + 0.5
    while any(_is_running(task) for task in Path("/proc/self/task").glob("*") if task.name not in pythons):
        if time.monotonic() > deadline:
            return
        time.sleep(0.0005)


def _is_running(task: Path) -> bool:
    try:
        state = (task / "stat").read_text().rpartition(") ")[2][0]
    except OSError:  # it has just ended
        return False
    return state in "RD"


@contextmanager
def workers_protected(loader: Any) -> Iterator[None]:
    """Start the workers of ``loader`` meanwhile: they live on when a training is asked to end, and do not hang."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        yield
        return
    given, before = loader.worker_init_fn, signal.pthread_sigmask(signal.SIG_BLOCK, _DEFAULTS)  # which forks inherit
    protect_workers(loader)
    _wait_for_other_threads()
    try:
        yield
    finally:
        loader.worker_init_fn = given
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def protect_workers(loader: DataLoader[Any]) -> None:
    """Let all workers that ``loader`` starts live on then, also those that it starts late."""
    if not isinstance(loader.worker_init_fn, _ProtectedInit):
        loader.worker_init_fn = _ProtectedInit(loader.worker_init_fn)


def iterate_protected(loader: Any) -> Iterator[Any]:
    """Iterate ``loader`` to its first end. Signals that a run only notes do not end its workers."""
    with workers_protected(loader):
        batches = iter(loader)
    return batches if type(batches).__module__.startswith("torch.") else _until_end(batches)


def _until_end(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches. Some iterators begin again when they are asked or iterated once more, as those of DALI."""
    with suppress(StopIteration):
        while True:
            yield next(batches)
