"""Lightning's profilers: as the Trainer's ``profiler``, they are callbacks here."""

from __future__ import annotations

from typing import Any

from ....callbacks import AdvancedProfiler as NativeAdvancedProfiler
from ....callbacks import Profiler
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


class PassThroughProfiler(Profiler):
    """Measures nothing: what ``trainer.profiler`` is without one."""


class SimpleProfiler(NativeSimpleProfiler):
    """A :class:`~loopwright.callbacks.SimpleProfiler`.

    Args:
        dirpath: the folder for the table.
        filename: of the table; None only prints it.
        extended: accepted for familiarity.
    """

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)


class AdvancedProfiler(NativeAdvancedProfiler):
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
    """

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


XLAProfiler = unserved("XLAProfiler", "there is no support for TPUs")
