"""Lightning's profilers: as the Trainer's ``profiler``, they are callbacks here."""

from __future__ import annotations

import logging
from typing import Any

from torch.profiler import ProfilerAction

from ....callbacks import AdvancedProfiler as NativeAdvancedProfiler
from ....callbacks import Profiler
from ....callbacks import PyTorchProfiler as NativePyTorchProfiler
from ..imports import unserved
from .profiled_sections import ProfiledSections
from .utilities import MisconfiguredValue

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "XLAProfiler",
]


log = logging.getLogger("loopwright")


class _Reports(Profiler):
    """Reports as Lightning's profilers do: by the logger, and where ``dirpath`` says afterwards."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.dirpath is None:
            self.dirpath = self._folder

    def show(self, text: str, path: str | None) -> None:
        log.info("%s", " ".join(filter(None, (self._stage.upper(), text))))


class PassThroughProfiler(Profiler):
    """Measures nothing: what ``trainer.profiler`` is without one."""


class SimpleProfiler(_Reports, ProfiledSections):
    """A :class:`~loopwright.callbacks.SimpleProfiler`.

    Beside a program's own sections, ``recorded_durations`` has epochs, batches, steps and backward passes by
    Lightning's names, such as ``run_training_batch``; hooks have none.

    Args:
        dirpath: the folder for the table.
        filename: of the table; None only prints it.
        extended: also show how often, and which share of the time.
    """

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended

    def summary(self) -> str:
        """A table of what was recorded, and one of the loop's sections, which add up to the whole."""
        recorded = "\n".join(self._rows())
        # What was recorded is in the first one.
        sections = self.table().partition("within these:")[0].rstrip()
        parts = ["Profiler Report", recorded, sections if self.seconds else ""]
        return "\n".join(filter(None, parts))

    def _rows(self) -> list[str]:
        """The table of what was recorded, the longest first."""
        measured = {name: sum(times) for name, times in self.recorded_durations.items()}
        if not measured:
            return []
        every = sum(measured.values())
        heading = ["Mean duration (s)", "Total time (s)"]
        if self.extended:
            heading = [
                "Mean duration (s)",
                "Num calls",
                "Total time (s)",
                "Percentage %",
            ]
        rows = [["Action", *heading]]
        if self.extended:
            calls = sum(map(len, self.recorded_durations.values()))
            rows.append(["Total", "-", str(calls), f"{every:.5}", "100 %"])
        for name, total in sorted(measured.items(), key=lambda item: -item[1]):
            count = len(self.recorded_durations[name])
            cells = [f"{total / count:.5}", f"{total:.5}"]
            if self.extended:
                share = 100 * total / every if every else 0.0
                cells = [cells[0], str(count), cells[1], f"{share:.5}"]
            rows.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            " | ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in rows
        ]


class AdvancedProfiler(_Reports, NativeAdvancedProfiler):
    """A :class:`~loopwright.callbacks.AdvancedProfiler`.

    Args:
        dirpath: the folder for the tables.
        filename: of the tables; None prints them.
        line_count_restriction: rows of each table: a number, or a fraction of all.
        dump_stats: also write each section's profile.
    """

    def __init__(
        self,
        dirpath: Any = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename, line_count_restriction, dump_stats)

    def summary(self) -> str:
        """A table for each section."""
        text = super().summary()
        return f"Profiler Report\n{text}" if text else ""

    def path_of(self, ending: str, action_name: str = "") -> str | None:
        """A file of the results; a section's is there without a name for all, too."""
        if self.filename or not action_name:
            return super().path_of(ending, action_name)
        # The section's name is the file's.
        self.filename = action_name
        try:
            return super().path_of(ending)
        finally:
            self.filename = None


class PyTorchProfiler(NativePyTorchProfiler):
    """A :class:`~loopwright.callbacks.PyTorchProfiler`.

    Args:
        dirpath: the folder for traces and table.
        filename: of the table; None only prints it.
        group_by_input_shapes: have a row of the table for each shape that an operator was given.
        emit_nvtx: must be False.
        export_to_chrome: False writes no trace.
        row_limit: rows of the table.
        sort_by_key: column by which the table is sorted.
        record_module_names: accepted for familiarity.
        **profiler_kwargs: of ``torch.profiler.profile``, such as ``schedule``, or of
            :class:`~loopwright.callbacks.PyTorchProfiler`.

    Raises:
        NotImplementedError: for ``emit_nvtx``.
        MisconfigurationException: for a key that no column has, or a ``schedule`` that is none.
    """

    AVAILABLE_SORT_KEYS = frozenset(
        f"{prefix}{device}_time{total}"
        for prefix in ("", "self_")
        for device in ("cpu", "cuda")
        for total in ("", "_total")
        if total or not prefix
    ) | {
        "cpu_memory_usage",
        "cuda_memory_usage",
        "self_cpu_memory_usage",
        "self_cuda_memory_usage",
        "count",
    }

    def __init__(
        self,
        dirpath: Any = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        **profiler_kwargs: Any,
    ) -> None:
        if sort_by_key and sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfiguredValue(
                f"Found sort_by_key: {sort_by_key}. Should be within {sorted(self.AVAILABLE_SORT_KEYS)}."
            )
        _check_schedule(profiler_kwargs.get("schedule"))
        if emit_nvtx:
            raise NotImplementedError(
                "PyTorchProfiler(emit_nvtx=True) is not there: fit inside torch.autograd.profiler.emit_nvtx()"
            )
        if not export_to_chrome:
            profiler_kwargs.setdefault("on_trace_ready", lambda profiler: None)
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            group_by_input_shape=group_by_input_shapes,
            row_limit=row_limit,
            sort_by=sort_by_key,
            **profiler_kwargs,
        )


def _check_schedule(schedule: Any) -> None:
    """Refuse a schedule that does not tell what to do at a step."""
    if schedule is None:
        return
    if not callable(schedule):
        raise MisconfiguredValue(f"Schedule should be a callable; got {schedule!r}")
    action = schedule(0)
    if not isinstance(action, ProfilerAction):
        raise MisconfiguredValue(
            f"Schedule should return a `torch.profiler.ProfilerAction`; got {action!r}"
        )


XLAProfiler = unserved("XLAProfiler", "there is no support for TPUs")
