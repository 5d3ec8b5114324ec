"""What the record holds of a run's steps, and whether the steps of a program that is run again are the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .files import METRICS_FILE, read_rows
from .fingerprints import FILE as FINGERPRINTS_FILE
from .fingerprints import fingerprint_of, loss_of

if TYPE_CHECKING:
    from ..module import Module
    from ..trainer import Trainer

# The parts of a fingerprint, in the order in which a step computes them.
_PARTS = ("loss", "gradients", "parameters")


class RecordedSteps:
    """Compares steps with the record, on each rank.

    Args:
        folder: of the record.
        step: the step that is asked for.
        rank: this process.
    """

    def __init__(self, folder: str, step: int, rank: int) -> None:
        self._step = step
        self._rank = rank
        path = os.path.join(folder, FINGERPRINTS_FILE)
        fingerprints = read_rows(path, range(step + 1))
        self._fingerprints = {line["step"]: line for line in fingerprints}
        path = os.path.join(folder, METRICS_FILE)
        self._rows = [*read_rows(path, range(step, step + 1))]
        self._compared = 0
        self._first_other: int | None = None

    def begins_otherwise(self, trainer: Trainer, module: Module) -> bool:
        """Whether a training that begins at the beginning has other parameters than it had. A collective."""
        return bool(self._differing(trainer, module, 0, None))

    def pass_by(self, trainer: Trainer, module: Module, outputs: Any) -> None:
        """A step on the way was taken: compare it, if there is a fingerprint of it. A collective."""
        step = trainer.global_step
        if step not in self._fingerprints:
            return
        self._compared += 1
        # On all ranks, whatever this one has found before.
        differing = self._differing(trainer, module, step, outputs)
        if differing and self._first_other is None:
            self._first_other = step

    def compare(
        self, trainer: Trainer, module: Module, outputs: Any, row: Mapping[str, Any]
    ) -> Iterator[str]:
        """Say whether the step is the one that was recorded. A collective.

        Args:
            trainer: right after the step.
            module: its module.
            outputs: what the step's last batch has returned.
            row: what was logged with the step.
        """
        if self._first_other is not None:
            yield f"on the way        differs from what was recorded from step {self._first_other} on, or before it"
        elif self._compared:
            yield f"on the way        equal to the fingerprints of {self._compared} steps"
        if self._step in self._fingerprints:
            parts = self._differing(trainer, module, self._step, outputs)
            if parts:
                yield f"fingerprint       differs from what was recorded: {', '.join(parts)}"
            else:
                yield "fingerprint       equals what was recorded, bit for bit: loss, gradients, parameters"
        if row and self._rows:
            yield from self._compare_row(row)
        elif self._step not in self._fingerprints:
            yield "recorded          nothing of this step (log_every_n_steps, fingerprint)"

    def _compare_row(self, row: Mapping[str, Any]) -> Iterator[str]:
        values: dict[str, Any] = {}
        for line in self._rows:
            values |= line["values"]
        # What monitors have measured differs from time to time.
        names = sorted(
            name
            for name in values.keys() & row.keys()
            if not name.startswith("monitor/")
        )
        differing = [name for name in names if not _equal(values[name], row[name])]
        if differing:
            told = ", ".join(
                f"{name} is {row[name]!r}, was {values[name]!r}" for name in differing
            )
            yield f"logged values     differ from what was recorded: {told}"
        elif names:
            yield f"logged values     equal what was recorded: {', '.join(names)}"

    def _differing(
        self, trainer: Trainer, module: Module, step: int, outputs: Any
    ) -> list[str]:
        """Return the parts of a fingerprint that are other ones now. A collective, where tensors are sharded."""
        line = self._fingerprints.get(step)
        if line is None:
            return []
        now = fingerprint_of(trainer, module, loss_of(outputs))
        losses = line.get("losses")
        then = {**line, "loss": losses[self._rank]} if losses else line
        return [
            part
            for part in _PARTS
            if then.get(part) is not None and then[part] != now[part]
        ]


def _equal(value: Any, other: Any) -> bool:
    # The record writes numbers that JSON lacks as texts.
    value = float(value)
    other = float(other)
    return value == other or (math.isnan(value) and math.isnan(other))
