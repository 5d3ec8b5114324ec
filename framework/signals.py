"""Signals that ask a training to end: noted while it runs, and acted upon where the loop has finished a window."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .control import Control

_HINT = b"\nInterrupted: the step is finished and a checkpoint saved. Once more ends at once.\n"

# What ends a job: the system's or a scheduler's request, SLURM's and others' warning ahead of it, and Ctrl-C.
_DEFAULTS: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class Signals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C are only noted; a second Ctrl-C raises at once.

    A signal for which the program has a handler of its own is left to it. One that was noted and not acted upon is
    sent again on leaving.

    Args:
        control: where they are noted.
        is_main: whether this process tells the user.
    """

    def __init__(self, control: Control, is_main: bool) -> None:
        self.control, self.is_main = control, is_main
        self._process = os.getpid()
        self._set: list[int] = []
        self.in_a_hurry = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only there Python sets handlers
            for number, default in _DEFAULTS.items():
                if signal.getsignal(number) is default:
                    signal.signal(number, self._note)
                    self._set.append(number)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number in self._set:
            signal.signal(number, _DEFAULTS[number])
        if exception[0] is None and self.control.wants_signal:
            os.kill(self._process, self.control.wants_signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which has inherited this
            signal.signal(number, _DEFAULTS[number])
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.control.wants_signal == signal.SIGINT:
            self.in_a_hurry = True
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.is_main:
            os.write(2, _HINT)  # which, unlike print, may interrupt anything
        self.control.note_signal(number)
