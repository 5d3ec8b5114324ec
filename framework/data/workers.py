"""The worker processes of loaders: they start without harm from signals and threads, and outlive signals."""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

# By which SLURM and others warn ahead of a job's end.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
# What ends a job: the system's or a scheduler's request, a warning ahead of it, and Ctrl-C.
DEFAULT_HANDLERS: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    **dict.fromkeys(WARNINGS, signal.SIG_DFL),
    signal.SIGINT: signal.default_int_handler,
}


def is_free(number: int) -> bool:
    """Whether nobody has set a handler for a signal: neither Python code nor, as ``faulthandler.register``, C code."""
    handler = signal.getsignal(number)
    if handler is not DEFAULT_HANDLERS[number]:
        return False
    return handler is not signal.SIG_DFL or not _is_caught(number)


def _is_caught(number: int) -> bool:
    """Whether this process has a handler for a signal, of which Python need not know; False where only it knows."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


class _Noting:
    """How many runs of this process only note signals now, to act on them later; its workers see that, if forked."""

    def __init__(self) -> None:
        self._count = mmap.mmap(-1, 1)
        self._process = os.getpid()

    def add(self, number: int) -> None:
        """Count so many more runs, or fewer."""
        if self._process != os.getpid():
            # A fork that has runs of its own counts them apart.
            self._count = mmap.mmap(-1, 1)
            self._process = os.getpid()
        self._count[0] += number

    def forget(self) -> None:
        """Count no run of this process any more."""
        if self._process == os.getpid():
            self._count[0] = 0

    def __bool__(self) -> bool:
        return self._count[0] > 0


noting = _Noting()
# The end of a program ends workers by SIGTERM and waits for them; a daemon thread may still be training then.
atexit.register(noting.forget)


class _Runs(threading.local):
    """What the runs of a thread have begun to iterate, the innermost run's last: loaders by their iterators."""

    def __init__(self) -> None:
        self.iterated: list[WeakKeyDictionary[Any, Any]] = []


_runs = _Runs()


def note_in_worker(number: int, frame: FrameType | None) -> None:
    """A worker's signal handler: it ends, unless the run only notes signals now."""
    if not noting:
        # torch ends its workers by SIGTERM, which is no error.
        os._exit(0 if number == signal.SIGTERM else 128 + number)


class _ProtectedInit:
    """A loader's ``worker_init_fn`` after which the worker ignores signals while the main process only notes them.

    Until it has been called, signals are blocked: before torch's handlers are replaced, SIGTERM would end the worker.
    """

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, worker_id: int) -> None:
        # torch's own handler would end the worker at SIGTERM.
        for number in DEFAULT_HANDLERS:
            signal.signal(number, note_in_worker)
        # `workers_protected` has blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEFAULT_HANDLERS)
        if self.function is not None:
            self.function(worker_id)


def _wait_for_other_threads() -> None:
    """Wait until no thread of a library is running, but for half a second at most.

    A fork copies locks as they are, and what another thread holds at that moment nobody releases in the child. After a
    collective, a thread of torch.distributed enters Python to drop its tensors. Before 3.10.15 and 3.11.10, a child
    that is forked meanwhile can wait for a lock of Python's for ever: https://github.com/python/cpython/issues/112275.
    Python's own threads are no danger: they take that lock only while they hold the interpreter's, which is ours now.
    """
    of_python = {str(thread.native_id) for thread in threading.enumerate()}
    deadline = time.monotonic() + 0.5
    while any(
        _is_running(task)
        for task in Path("/proc/self/task").glob("*")
        if task.name not in of_python
    ):
        if time.monotonic() > deadline:
            return
        time.sleep(0.0005)


def _is_running(task: Path) -> bool:
    try:
        state = (task / "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        # The thread has just ended.
        return False
    return state in "RD"


@contextmanager
def workers_protected(loader: Any) -> Iterator[None]:
    """Let the workers that ``loader`` starts in the block live on when a training is asked to end, and not hang."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        yield
        return
    given = loader.worker_init_fn
    # A fork inherits the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEFAULT_HANDLERS)
    protect_workers(loader)
    # Workers put their sockets into a folder of this process, which removes it; a killed one could not.
    get_temp_dir()
    _wait_for_other_threads()
    try:
        yield
    finally:
        loader.worker_init_fn = given
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def protect_workers(loader: DataLoader[Any]) -> None:
    """As :func:`workers_protected`, for whatever workers ``loader`` starts from now on."""
    if not isinstance(loader.worker_init_fn, _ProtectedInit):
        loader.worker_init_fn = _ProtectedInit(loader.worker_init_fn)


def iterate_protected(loader: Any) -> Iterator[Any]:
    """Iterate ``loader`` until it ends for the first time. Signals that a run only notes do not end its workers."""
    with workers_protected(loader):
        batches = iter(loader)
    if _runs.iterated and hasattr(batches, "_shutdown_workers"):
        _runs.iterated[-1][batches] = loader
    if type(batches).__module__.startswith("torch."):
        return batches
    # Once: some iterators, as those of DALI, begin again when they are asked after their end.
    return islice(batches, None)


@contextmanager
def workers_ended(is_hurried: Callable[[], bool]) -> Iterator[None]:
    """End the workers that iterations have begun in the block, though somebody may still hold these.

    An epoch that was left may be held by its loader, or by the traceback of the error that has ended it. Workers that a
    user's loader keeps by ``persistent_workers`` are the user's.

    Args:
        is_hurried: whether to leave them to the end of the program, as one may be waited for for 5 s.
    """
    iterated: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
    _runs.iterated.append(iterated)
    try:
        yield
    finally:
        _runs.iterated.pop()
        for batches, loader in () if is_hurried() else [*iterated.items()]:
            kept = vars(loader).get("_iterator") if loader.persistent_workers else None
            if kept is not batches:
                batches._shutdown_workers()
