"""Where the time goes, by functions of Python."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import tempfile
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from .profiler import Profiler, destination

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class AdvancedProfiler(Profiler):
    """Measure each function of Python by ``cProfile``, apart for each section of the run.

    Sections are those of :class:`~.profiler.Profiler`. What runs in a section within another one counts for the inner
    one only: a training batch is without its backward pass. Only the thread that trains is measured, so what autograd
    does in threads of its own is seen as the time that ``backward`` waits for it.

    Args:
        dirpath: the folder for results, a path or an fsspec URL. Default: the Trainer's ``log_dir``.
        filename: the tables go to ``<stage>-<filename>.txt``; None prints them.
        line_count_restriction: rows of each table: a number (int), or a fraction of all (float).
        dump_stats: also write each section's profile to ``<stage>-<filename>-<section>.prof``, for ``pstats`` and the
            viewers that read its files.

    Attributes:
        profiled_actions: the profiles by section.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = "profile",
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: defaultdict[str, cProfile.Profile] = defaultdict(
            cProfile.Profile
        )
        # The sections that have begun, the innermost last.
        self._open: list[str] = []

    def start(self, action_name: str) -> None:
        # Python has one profile at a time.
        self._pause()
        self._open.append(action_name)
        self.profiled_actions[action_name].enable()

    def stop(self, action_name: str) -> None:
        """A section ends.

        Args:
            action_name: its name.

        Raises:
            ValueError: if it has not begun.
        """
        if action_name not in self._open:
            raise ValueError(
                f"Attempting to stop recording an action ({action_name}) which was never started."
            )
        self._pause()
        # Those within it that were left without their end, too.
        while self._open.pop() != action_name:
            pass
        if self._open:
            self.profiled_actions[self._open[-1]].enable()

    def _pause(self) -> None:
        if self._open:
            self.profiled_actions[self._open[-1]].disable()

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.profiled_actions.clear()

    def describe(self) -> None:
        self._pause()
        self._open = []
        super().describe()

    def summary(self) -> str:
        """A table for each section."""
        texts = []
        for action_name, profile in self.profiled_actions.items():
            profile.create_stats()
            # pstats refuses an empty one.
            if not profile.stats:
                continue
            if self.dump_stats:
                self._dump(action_name, profile)
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text).strip_dirs()
            stats.sort_stats("cumulative").print_stats(self.line_count_restriction)
            texts.append(f"{action_name}:\n{text.getvalue()}")
        return "\n".join(texts)

    def show(self, text: str, path: str | None) -> None:
        # Hundreds of rows.
        if path is None:
            super().show(text, path)
        else:
            print(f"Profile of {self._stage or 'sections'}: {path}", flush=True)

    def _dump(self, action_name: str, profile: Any) -> None:
        path = self.path_of(".prof", action_name)
        if path is None:
            return
        system, plain = destination(path)
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "stats.prof")
            profile.dump_stats(local)
            system.put_file(local, plain)

    def __getstate__(self) -> dict[str, Any]:
        # A profile belongs to a thread.
        return {
            **self.__dict__,
            "profiled_actions": defaultdict(cProfile.Profile),
            "_open": [],
        }
