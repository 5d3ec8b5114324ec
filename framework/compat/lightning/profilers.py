"""Lightning's profilers: as the Trainer's ``profiler``, they are callbacks here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ....callbacks import Callback
from ....callbacks import PyTorchProfiler as NativePyTorchProfiler
from ....callbacks import SimpleProfiler as NativeSimpleProfiler
from ..imports import unserved

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "XLAProfiler",
]


class Profiler(Callback):
    """The base of profilers; a subclass measures what its ``start`` and ``stop`` are called with.

    Args:
        dirpath: accepted for familiarity; results go to the Trainer's ``log_dir``.
        filename: of the results.
    """

    def __init__(self, dirpath: Any = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename

    def start(self, action_name: str) -> None:
        """A section begins."""

    def stop(self, action_name: str) -> None:
        """A section ends."""

    def summary(self) -> str:
        """What was measured."""
        return ""

    def describe(self) -> None:
        """Print :meth:`summary`."""
        if text := self.summary():
            print(text)

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measure a ``with`` block."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)


class PassThroughProfiler(Profiler):
    """Measures nothing."""


class SimpleProfiler(NativeSimpleProfiler):
    """A :class:`~loopwright.callbacks.SimpleProfiler`.

    Args:
        dirpath: accepted for familiarity; the table goes to the Trainer's ``log_dir``.
        filename: of the table.
        extended: accepted for familiarity.
    """

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, extended: bool = True
    ) -> None:
        options = {} if filename is None else {"filename": f"{filename}-{{stage}}.txt"}
        super().__init__(**options)


class PyTorchProfiler(NativePyTorchProfiler):
    """A :class:`~loopwright.callbacks.PyTorchProfiler`.

    Args:
        dirpath: accepted for familiarity; traces go to the Trainer's ``log_dir``.
        filename: accepted for familiarity.
        **kwargs: of :class:`~loopwright.callbacks.PyTorchProfiler`.
    """

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)


AdvancedProfiler = unserved(
    "AdvancedProfiler", 'run the program with "python -m cProfile"'
)
XLAProfiler = unserved("XLAProfiler", "there is no support for TPUs")
