"""Where the time goes, by operators: traces of torch's profiler."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.profiler import profile, record_function, schedule, supported_activities

from .arguments import require_int
from .base import Callback
from .profiler import Profiler, destination

if TYPE_CHECKING:
    from torch.profiler import ProfilerActivity

    from ..framework import Module, Trainer


class PyTorchProfiler(Profiler):
    """Trace a few steps with ``torch.profiler``, on the CPU and the accelerator.

    A trace for chrome://tracing or Perfetto, ``trace-<stage>-rank<r>-<n>.json``, is written for each profiled cycle,
    and a table of operators is printed at the end of the run. After ``repeat`` cycles the profiler costs next to
    nothing, and with ``wait`` the slow first steps are left out. ``trainer.profiler.profile(name)`` names a ``with``
    block in the trace.

    Args:
        wait: batches to leave out before each cycle.
        warmup: batches traced and thrown away, as the first ones are distorted.
        active: batches to trace.
        repeat: how many cycles; 0 goes on to the end.
        activities: what to trace; by default the CPU and the accelerator, if there is one.
        on_trace_ready: takes the place of writing a trace; gets the ``torch.profiler.profile``.
        sort_by: column by which the table is sorted; by default the accelerator's own time, or the CPU's.
        row_limit: rows of the table.
        dirpath: the folder for results, a path or an fsspec URL. Default: the Trainer's ``log_dir``.
        filename: the table goes to ``<stage>-<filename>.txt``; None only prints it.
        group_by_input_shape: have a row of the table for each shape that an operator was given.
        **profile_kwargs: further arguments of ``torch.profiler.profile``, such as ``record_shapes=True``,
            ``profile_memory=True`` or ``with_stack=True``.

    Attributes:
        profiler: the ``torch.profiler.profile`` while one runs and after, or None.
        trace_paths: the traces written.

    Raises:
        ValueError: if a count is not an int of at least 0 (``active``: 1).
    """

    def __init__(
        self,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        activities: Iterable[ProfilerActivity] | None = None,
        on_trace_ready: Callable[[profile], Any] | None = None,
        sort_by: str | None = None,
        row_limit: int = 20,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shape: bool = False,
        **profile_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        self._schedule = {
            "wait": wait,
            "warmup": warmup,
            "active": active,
            "repeat": repeat,
        }
        for name, count in self._schedule.items():
            require_int(name, count, least=1 if name == "active" else 0)
        self._activities = activities
        self._on_trace_ready = on_trace_ready
        self._sort_by = sort_by
        self._row_limit = row_limit
        # The table is to cover all cycles, unless there is no end to them.
        self._profile_kwargs = {"acc_events": repeat != 0, **profile_kwargs}
        self._by_shape = group_by_input_shape
        if group_by_input_shape:
            self._profile_kwargs["record_shapes"] = True
        self._running = False
        self._named: dict[str, list[record_function]] = {}
        self.profiler: profile | None = None
        self.trace_paths: list[str] = []

    def start(self, action_name: str) -> None:
        """Begin a named section of the trace.

        Args:
            action_name: its name.
        """
        section = record_function(action_name)
        section.__enter__()
        self._named.setdefault(action_name, []).append(section)

    def stop(self, action_name: str) -> None:
        """End a named section of the trace.

        Args:
            action_name: its name.

        Raises:
            ValueError: if it has not begun.
        """
        if not self._named.get(action_name):
            raise ValueError(f"PyTorchProfiler: {action_name!r} was never started")
        self._named[action_name].pop().__exit__(None, None, None)

    def _start(self, trainer: Trainer) -> None:
        def write(profiler: profile) -> None:
            name = f"trace-{trainer.state.fn}-rank{trainer.global_rank}-{len(self.trace_paths)}.json"
            self.trace_paths.append(f"{self._folder}/{name}")
            _write_trace(profiler, self.trace_paths[-1])

        self.trace_paths = []
        options: dict[str, Any] = {
            "activities": list(self._activities or supported_activities()),
            "schedule": schedule(**self._schedule),
            "on_trace_ready": self._on_trace_ready or write,
        }
        self.profiler = profile(**options | self._profile_kwargs)
        self.profiler.start()
        self._running = True

    def _stop(self) -> None:
        if self._running and self.profiler is not None:
            self._running = False
            self.profiler.stop()

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.profiler = None

    def summary(self) -> str:
        """The table of operators, and where the traces are; an empty text if nothing was traced."""
        self._stop()
        if self.profiler is None:
            return ""
        try:
            averages = self.profiler.key_averages(self._by_shape)
        except AssertionError:
            # That is torch's way to say that there is no event.
            needed = self._schedule["wait"] + self._schedule["warmup"] + 1
            return (
                f"PyTorchProfiler traced nothing: it needs at least {needed} batches."
            )
        times = [getattr(average, "self_device_time_total", 0) for average in averages]
        own_time = "self_device_time_total" if any(times) else "self_cpu_time_total"
        sort_by = self._sort_by or own_time
        table = averages.table(sort_by=sort_by, row_limit=self._row_limit)
        return "\n".join([table, *(f"Trace: {path}" for path in self.trace_paths)])

    # Only what a program names is a section of the trace; of the loop, it has the steps.
    on_train_epoch_start = Callback.on_train_epoch_start
    on_train_epoch_end = Callback.on_train_epoch_end
    on_train_batch_start = Callback.on_train_batch_start
    on_before_backward = Callback.on_before_backward
    on_after_backward = Callback.on_after_backward
    on_validation_batch_start = Callback.on_validation_batch_start
    on_test_batch_start = Callback.on_test_batch_start
    on_predict_batch_start = Callback.on_predict_batch_start

    def on_train_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        # A run that goes back starts once more, in the same trace.
        if not self._running:
            self._start(trainer)

    def _step(self, trainer: Trainer, pl_module: Module, *_: Any, **__: Any) -> None:
        # Inside fit, training sets the steps.
        is_step = trainer.training or trainer.state.fn != "fit"
        if is_step and self.profiler is not None:
            self.profiler.step()

    on_train_batch_end = on_validation_batch_end = _step
    on_test_batch_end = on_predict_batch_end = _step

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start(trainer)

    on_predict_start = on_test_start


def _write_trace(profiler: profile, path: str) -> None:
    system, plain = destination(path)
    with tempfile.TemporaryDirectory() as folder:
        # torch writes to local disks only.
        local = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(local)
        system.put_file(local, plain)
