"""Lightning's profilers: as the Trainer's ``profiler``, they are callbacks here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import record_function

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


class _Sections:
    """What programs call of the Trainer's profiler to measure sections of their own."""

    def start(self, action_name: str) -> None:
        """A section begins."""

    def stop(self, action_name: str) -> None:
        """A section ends."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measure a ``with`` block."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)


class Profiler(_Sections, Callback):
    """The base of profilers; a subclass measures what its ``start`` and ``stop`` are called with.

    They are called for the sections that a program measures by ``trainer.profiler.profile(name)``, and around each
    training epoch, training batch, backward pass and evaluation batch.

    Args:
        dirpath: accepted for familiarity; results go to the Trainer's ``log_dir``.
        filename: of the results.
    """

    def __init__(self, dirpath: Any = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename

    def summary(self) -> str:
        """What was measured."""
        return ""

    def describe(self) -> None:
        """Print :meth:`summary`."""
        if text := self.summary():
            print(text)

    def on_train_epoch_start(self, *_: Any, **__: Any) -> None:
        self.start("run_training_epoch")

    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self.stop("run_training_epoch")

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.start("run_training_batch")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.stop("run_training_batch")

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        self.start("backward")

    def on_after_backward(self, *_: Any, **__: Any) -> None:
        self.stop("backward")

    def _on_evaluation_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.start(f"{trainer.state.stage}_step")

    def _on_evaluation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.stop(f"{trainer.state.stage}_step")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        _on_evaluation_batch_start
    )
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        _on_evaluation_batch_end
    )


class PassThroughProfiler(_Sections):
    """Measures nothing: what ``trainer.profiler`` is without one."""


class SimpleProfiler(_Sections, NativeSimpleProfiler):
    """A :class:`~loopwright.callbacks.SimpleProfiler` that measures sections of a program's own, too.

    These are apart from its table of the loop, as they lie within sections of the loop.

    Args:
        dirpath: accepted for familiarity; the table goes to the Trainer's ``log_dir``.
        filename: of the table.
        extended: accepted for familiarity.

    Attributes:
        recorded_durations: in seconds, by the name that :meth:`profile` was given.
    """

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, extended: bool = True
    ) -> None:
        options = {} if filename is None else {"filename": f"{filename}-{{stage}}.txt"}
        super().__init__(**options)
        self.recorded_durations: defaultdict[str, list[float]] = defaultdict(list)
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        self._started[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        seconds = time.perf_counter() - self._started.pop(action_name)
        self.recorded_durations[action_name].append(seconds)

    def table(self) -> str:
        lines = [super().table()]
        if self.recorded_durations:
            lines.append("within these:")
        for name, durations in self.recorded_durations.items():
            count, total = len(durations), sum(durations)
            mean = total / count * 1e3
            lines.append(f"{name:<28}{total:>10.3f}{'':>8}{count:>10}{mean:>12.3f}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The table."""
        return self.table()


class PyTorchProfiler(_Sections, NativePyTorchProfiler):
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

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Name a ``with`` block in the trace."""
        with record_function(action_name):
            yield action_name


AdvancedProfiler = unserved(
    "AdvancedProfiler", 'run the program with "python -m cProfile"'
)
XLAProfiler = unserved("XLAProfiler", "there is no support for TPUs")
