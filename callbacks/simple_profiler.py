"""Where the time goes, by sections of the loop."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .profiler import Profiler

if TYPE_CHECKING:
    from ..framework import Module, Trainer


def _ends(section: str, next_section: str = "other") -> Callable[..., None]:
    """A hook of :class:`SimpleProfiler` that ends ``section``."""

    def hook(
        self: SimpleProfiler, trainer: Trainer, pl_module: Module, *_: Any
    ) -> None:
        self._end(section, next_section)

    return hook


class SimpleProfiler(Profiler):
    """Time the sections of the loop, and print a table of them at the end of the run.

    Each moment of the run counts for exactly one section: the one that the next hook ends. So the sections add up
    to the whole, and each of them includes what other callbacks did in it. Give it last, so that
    it sees checkpoints end. On an accelerator a section ends when its work is queued, not when it is done: for
    that use :class:`PyTorchProfiler`.

    What a program measures by ``trainer.profiler.profile(name)`` is apart from these, as it lies within them.

    Args:
        dirpath: the folder for results, a path or an fsspec URL. Default: the Trainer's ``log_dir``.
        filename: the table goes to ``<stage>-<filename>.txt``; None only prints it.

    Attributes:
        seconds: by section.
        counts: how often each section ended.
        recorded_durations: of the program's own sections, in seconds, by name.
    """

    # Given last, it is called after the callbacks that save.
    phase = "persist"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = "profile",
    ) -> None:
        super().__init__(dirpath, filename)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self._last = 0.0
        # The section that a checkpoint ends.
        self._interrupted = ""
        self._saving = False
        self.recorded_durations: defaultdict[str, list[float]] = defaultdict(list)
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """A section of the program's begins.

        Args:
            action_name: its name.

        Raises:
            ValueError: if it has begun already.
        """
        if action_name in self._started:
            raise ValueError(
                f"Attempted to start {action_name} which has already started."
            )
        self._started[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """A section of the program's ends.

        Args:
            action_name: its name.

        Raises:
            ValueError: if it has not begun.
        """
        if action_name not in self._started:
            raise ValueError(
                f"Attempting to stop recording an action ({action_name}) which was never started."
            )
        seconds = time.perf_counter() - self._started.pop(action_name)
        self.recorded_durations[action_name].append(seconds)

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
        lines.append(f"{'total':<28}{total:>10.3f}")
        if self.recorded_durations:
            lines.append("within these:")
        for name, durations in self.recorded_durations.items():
            count = len(durations)
            total = sum(durations)
            mean = total / count * 1e3
            lines.append(f"{name:<28}{total:>10.3f}{'':>8}{count:>10}{mean:>12.3f}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The table; an empty text if nothing was measured."""
        return self.table() if self.seconds or self.recorded_durations else ""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.seconds.clear()
        self.counts.clear()
        self.recorded_durations.clear()
        self._started.clear()
        self._saving = False
        self._last = time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._end("end of the run")
        super().teardown(trainer, pl_module, stage)

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
