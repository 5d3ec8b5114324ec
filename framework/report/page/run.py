"""A run as the page shows it, wherever it was read from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .series import Series

# A run that has no ending and has written nothing for so many seconds is taken for killed.
SILENT_SECONDS = 300.0


@dataclass
class Run:
    """What is known of a run; what its source does not tell is empty.

    Attributes:
        folder: where it was read.
        name: under which it is shown.
        source: ``"record"``, ``"tensorboard"``, ``"csv"``, ``"jsonl"`` or ``"trainer_state"``.
        series: curves, by metric.
        epoch_ends: the last step seen in each epoch.
        media: logged images, texts, tables, histograms and sounds: ``step``, ``name``, ``kind`` and ``value``, or
            ``file``, a path, or ``data``, bytes.
        record: the content of ``run.json``.
        config: hyperparameters and arguments, nested.
        failure: the content of ``failure.json``.
        written: when its folder was written last, in seconds since 1970.
        problems: what could not be read, for the reader.
    """

    folder: Path
    name: str
    source: str
    series: dict[str, Series] = field(default_factory=dict)
    epoch_ends: dict[float, float] = field(default_factory=dict)
    media: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)
    written: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, step: float, value: float, time: float = math.nan) -> None:
        """Add a value of a metric."""
        series = self.series.get(name)
        if series is None:
            series = self.series[name] = Series()
        series.add(step, value, time)

    def add_media(self, step: float, name: str, kind: str, **content: Any) -> None:
        """Add an image, a text and so on."""
        entry = {"step": step, "name": name, "kind": kind}
        self.media.append(entry | content)

    def note_epoch(self, epoch: float | None, step: float) -> None:
        """Note that a step belongs to an epoch."""
        if epoch is None or not math.isfinite(epoch):
            return
        if step >= self.epoch_ends.get(epoch, -1):
            self.epoch_ends[epoch] = step

    @property
    def started(self) -> float:
        """When it logged first, in seconds since 1970; NaN if nobody knows."""
        firsts = [
            series.times[0]
            for series in self.series.values()
            if len(series) and math.isfinite(series.times[0])
        ]
        return min(firsts, default=math.nan)

    @property
    def last_step(self) -> float:
        """The highest step with a value."""
        return max(
            (max(series.steps) for series in self.series.values() if len(series)),
            default=0,
        )
