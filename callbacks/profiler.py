"""Where the time goes: by sections of the loop, or by operators."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .arguments import require_int
from .base import Callback

if TYPE_CHECKING:
    from torch.profiler import ProfilerActivity, profile

    from ..framework import Module, Trainer


def _folder(trainer: Trainer) -> str:
    """Make the folder for the results. A collective, as each process alone might choose another version number."""
    folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
    os.makedirs(folder, exist_ok=True)
    return folder


def _ends(section: str, next_section: str = "other") -> Callable[..., None]:
    """A hook of :class:`SimpleProfiler` that ends ``section``."""

    def hook(
        self: SimpleProfiler, trainer: Trainer, pl_module: Module, *_: Any
    ) -> None:
        self._end(section, next_section)

    return hook


class SimpleProfiler(Callback):
    """Time the sections of the loop, and print a table of them at the end of the run.

    Each moment of the run counts for exactly one section: the one that the next hook ends. So the sections add up
    to the whole, and each of them includes what other callbacks did in it. Give it last, so that
    it sees checkpoints end. On an accelerator a section ends when its work is queued, not when it is done: for
    that use :class:`PyTorchProfiler`.

    The table is also written to ``profile-<stage>.txt`` in the Trainer's ``log_dir``.

    Args:
        filename: another name for that file; ``{stage}`` in it stands for the stage.

    Attributes:
        seconds: by section.
        counts: how often each section ended.
    """

    # Given last, it is called after the callbacks that save.
    phase = "persist"

    def __init__(self, filename: str = "profile-{stage}.txt") -> None:
        self.filename = filename
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self._last = 0.0
        # The section that a checkpoint ends.
        self._interrupted = ""
        self._saving = False

    def _end(self, section: str, next_section: str = "other") -> None:
        """Count the time since the last call for ``section``; ``next_section`` is what a checkpoint would end."""
        now = time.perf_counter()
        self._interrupted = next_section
        if self._saving:
            section = "checkpoint"
            self._saving = False
        self.seconds[section] += now - self._last
        self.counts[section] += 1
        self._last = time.perf_counter()

    def table(self) -> str:
        """The sections, the longest first."""
        total = sum(self.seconds.values())
        lines = [
            f"{'section':<28}{'seconds':>10}{'share':>8}{'count':>10}{'mean ms':>12}"
        ]
        for section, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            count = self.counts[section]
            share = seconds / total if total else 0.0
            mean = seconds / count * 1e3
            lines.append(
                f"{section:<28}{seconds:>10.3f}{share:>8.1%}{count:>10}{mean:>12.3f}"
            )
        return "\n".join([*lines, f"{'total':<28}{total:>10.3f}"])

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self.seconds.clear()
        self.counts.clear()
        self._saving = False
        self._last = time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._end("end of the run")
        folder = _folder(trainer)
        if not trainer.is_global_zero:
            return
        print(f"Profile of {stage}:\n{self.table()}", flush=True)
        path = os.path.join(folder, self.filename.format(stage=stage))
        with open(path, "w", encoding="utf-8") as file:
            print(self.table(), file=file)

    # Each hook says what has just ended.
    on_train_start = _ends("start of the run")
    on_train_epoch_start = _ends("between epochs")
    on_train_batch_start = _ends("data loading")
    on_before_backward = _ends("forward")
    on_after_backward = _ends("backward", next_section="optimizer step")
    on_train_batch_end = _ends("optimizer step", next_section="end of epoch")
    on_train_epoch_end = _ends("end of epoch")
    on_train_end = _ends("end of the run")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _ends(
        "evaluation data loading"
    )
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _ends(
        "evaluation step", next_section="end of evaluation"
    )
    on_validation_end = on_test_end = on_predict_end = _ends("end of evaluation")

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        before = "start of the run" if trainer.sanity_checking else "before evaluation"
        self._end(before)

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: Module,
        checkpoint: dict[str, Any],
    ) -> None:
        self._end(self._interrupted, next_section="checkpoint")
        # There is no hook at its end: it is what comes until the next one.
        self._saving = True


class PyTorchProfiler(Callback):
    """Trace a few steps with ``torch.profiler``, on the CPU and the accelerator.

    A trace for chrome://tracing or Perfetto, ``trace-<stage>-rank<r>-<n>.json``, goes to the Trainer's ``log_dir``
    for each profiled cycle, and a table of operators is printed at the end of the run. After ``repeat``
    cycles the profiler costs next to nothing, and with ``wait`` the slow first steps are left out.

    Args:
        wait: batches to leave out before each cycle.
        warmup: batches traced and thrown away, as the first ones are distorted.
        active: batches to trace.
        repeat: how many cycles; 0 goes on to the end.
        activities: what to trace; by default the CPU and the accelerator, if there is one.
        on_trace_ready: takes the place of writing a trace; gets the ``torch.profiler.profile``.
        sort_by: column by which the table is sorted; by default the accelerator's own time, or the CPU's.
        row_limit: rows of the table.
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
        **profile_kwargs: Any,
    ) -> None:
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
        self._running = False
        self.profiler: profile | None = None
        self.trace_paths: list[str] = []

    def _start(self, trainer: Trainer) -> None:
        from torch.profiler import profile, schedule, supported_activities

        folder = _folder(trainer)

        def write(profiler: profile) -> None:
            name = f"trace-{trainer.state.fn}-rank{trainer.global_rank}-{len(self.trace_paths)}.json"
            self.trace_paths.append(os.path.join(folder, name))
            profiler.export_chrome_trace(self.trace_paths[-1])

        self.trace_paths = []
        self.profiler = profile(
            activities=list(self._activities or supported_activities()),
            schedule=schedule(**self._schedule),
            on_trace_ready=self._on_trace_ready or write,
            **self._profile_kwargs,
        )
        self.profiler.start()
        self._running = True

    def _stop(self) -> None:
        if self._running and self.profiler is not None:
            self._running = False
            self.profiler.stop()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._stop()
        if self.profiler is None or not trainer.is_global_zero:
            return
        try:
            averages = self.profiler.key_averages()
        except AssertionError:
            # That is torch's way to say that there is no event.
            needed = self._schedule["wait"] + self._schedule["warmup"] + 1
            message = (
                f"PyTorchProfiler traced nothing: it needs at least {needed} batches."
            )
            print(message, flush=True)
            return
        times = [getattr(average, "self_device_time_total", 0) for average in averages]
        own_time = "self_device_time_total" if any(times) else "self_cpu_time_total"
        sort_by = self._sort_by or own_time
        print(averages.table(sort_by=sort_by, row_limit=self._row_limit), flush=True)
        for path in self.trace_paths:
            print(f"Trace: {path}", flush=True)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: Module,
        exception: BaseException,
    ) -> None:
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
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
