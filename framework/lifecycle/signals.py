"""Signals that ask a training to end: noted while it runs, and acted upon where the loop has finished a window.

They often go to all processes of a job, a loader's workers among them, which must live until the window is finished.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...strategies.launch.failure_files import is_adding
from ...strategies.launch.failures import record_stop
from ...strategies.launch.processes import find_peers, one_is_gone
from ..data.workers import DEFAULT_HANDLERS, is_free, note_in_worker, noting
from .preemption import Preemption, requeue_outside

if TYPE_CHECKING:
    from ..trainer import Trainer

_HINT = b"\nInterrupted: the step is finished and a checkpoint saved. Once more ends at once.\n"

# Runs in several threads of one program may begin and end at the same time.
_counting = threading.Lock()


class Signals:
    """From :meth:`begin` to :meth:`end`, the signals that ask to end are only noted; a second Ctrl-C raises at once.

    A signal for which the program has a handler of its own is left to it.

    Args:
        trainer: whose training it is.

    Attributes:
        in_a_hurry: whether the user has pressed Ctrl-C a second time.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.consensus = trainer.consensus
        self.is_main = trainer.is_global_zero
        self._process = os.getpid()
        self._peers: frozenset[int] = frozenset()
        # What handled them before.
        self._handled: dict[int, Any] = {}
        self._is_noting = False
        self._preemption = Preemption(trainer)
        self.in_a_hurry = False

    def stand_by(self) -> None:
        """Begin a fit: until it trains, nothing is noted."""
        self._preemption.stand_by()

    def begin(self) -> None:
        """Note signals from now on."""
        self._peers = find_peers()
        self._count_as_noting(True)
        self._preemption.begin()
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in DEFAULT_HANDLERS:
                before = signal.getsignal(number)
                if before is requeue_outside or is_free(number):
                    signal.signal(number, self._note)
                    self._handled[number] = before

    def end(self) -> None:
        """Let signals do what they did before."""
        self._count_as_noting(False)
        self._preemption.end()
        for number, before in self._handled.items():
            # A job that is back in the queue ignores SIGTERM, and ends by itself.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, before)
        self._handled = {}

    def _count_as_noting(self, is_noting: bool) -> None:
        """Count this run among those that only note signals, or no longer; loaders' workers see the number."""
        with _counting:
            noting.add(is_noting - self._is_noting)
            self._is_noting = is_noting

    def send_again(self) -> None:
        """Send once more what was noted, and not acted upon."""
        if self.consensus.signal_requested:
            os.kill(self._process, self.consensus.signal_requested)

    def requeue(self, number: int, has_saved: bool) -> None:
        """Put the job back into SLURM's queue, where the signal ``number`` asks for that. A collective."""
        if self._preemption.requeues_for(number):
            self._preemption.requeue(has_saved)

    def wait_for_main(self) -> None:
        """Let the main rank be the first that ends, if the job is back in the queue."""
        self._preemption.wait_for_main()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A fork of this process, such as a loader's worker, inherits its handlers.
        if os.getpid() != self._process:
            note_in_worker(number, frame)
            return
        # The loop would wait in a collective for a process that has ended, and never finish the window.
        if number == signal.SIGTERM and one_is_gone(self._peers):
            # It ends by itself, as soon as it has told why.
            if is_adding():
                return
            record_stop(frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
            return
        # torchelastic's agent turns a second Ctrl-C into SIGTERM.
        if self.consensus.signal_requested == signal.SIGINT and number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):
            self.in_a_hurry = True
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.is_main:
            # A handler may interrupt anything, a print too, and then must not print itself.
            os.write(2, _HINT)
        self.consensus.request_end_by_signal(number)
