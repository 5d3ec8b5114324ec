"""``loopwright diff RUN RUN``: how two runs were started, and where they begin to differ."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import METRICS_FILE, RUN_FILE, read_rows
from .fingerprints import FILE
from .trace import FirstDifference, Trace, compare_traces

# What is compared of run.json, in this order; what is left out differs from run to run.
SECTIONS = (
    "config",
    "packages",
    "git",
    "seeds",
    "batch",
    "strategy",
    "precision",
    "model",
    "hardware",
    "launcher",
    "command",
)
# Values in these sections that differ between two processes of one program.
BY_CHANCE = (
    "pid",
    "orig_argv",
    "environment.TORCHELASTIC_",
    "environment.LOOPWRIGHT_AGENT",
    "environment.LOOPWRIGHT_BEATS",
    "environment.MASTER_PORT",
)
# What a line of fingerprints tells, in the order in which a step computes it.
PARTS = ("loss", "gradients", "parameters")

# Runs step N of the run whose record is in a folder once more, and returns what it has computed.
Replay = Callable[[Path, int], Trace]


@dataclass
class FirstStep:
    """The first step with fingerprints in both runs at which these differ.

    Attributes:
        step: the number of optimizer steps that were done.
        parts: which of ``"loss"``, ``"gradients"`` and ``"parameters"`` differ.
        losses: those of the two runs; None for one that has none.
        before: the last step before it at which all were equal; None if there is none.
    """

    step: int
    parts: list[str]
    losses: tuple[float | None, float | None]
    before: int | None

    def __str__(self) -> str:
        if self.step == 0:
            return "they begin with other parameters"
        last = "no earlier step has fingerprints of both"
        if self.before is not None:
            last = f"step {self.before} is the last one at which all were equal"
        losses = ""
        if "loss" in self.parts:
            losses = " ({!r} and {!r})".format(*self.losses)
        return f"they differ at step {self.step} in {', '.join(self.parts)}{losses}; {last}"


def settings_that_differ(first: Path, second: Path) -> Iterator[tuple[str, Any, Any]]:
    """Give each value of the two records' ``run.json`` that differs: its name, and both; None where there is none."""
    first_run = _read_run(first)
    second_run = _read_run(second)
    for section in SECTIONS:
        values = _flat(first_run.get(section))
        others = _flat(second_run.get(section))
        for name in dict.fromkeys([*values, *others]):
            value = values.get(name)
            other = others.get(name)
            if value != other:
                whole = f"{section}.{name}" if name else section
                yield whole, value, other


def _read_run(record: Path) -> dict[str, Any]:
    file = record / RUN_FILE
    if not file.is_file():
        return {}
    # Paths inside of the run's own folder differ by its name only.
    own = json.dumps(str(record.parent.resolve()))[1:-1]
    return json.loads(file.read_text().replace(own, "RUN"))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested values by names with dots; what a list holds is named by its class or name."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        named = [each.get("class") or each.get("name") for each in value]
        # Two of one class are told apart by their places.
        if len({*named}) < len(named) or None in named:
            named = list(range(len(value)))
        value = dict(zip(named, value, strict=True))
    if not isinstance(value, dict):
        return {name: value}
    found = {}
    for key, each in value.items():
        whole = f"{name}.{key}" if name else str(key)
        if not whole.startswith(BY_CHANCE):
            found |= _flat(each, whole)
    return found


def read_fingerprints(record: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a record's fingerprints by step; none if it has kept none."""
    return {row["step"]: row for row in read_rows(record / FILE)}


def first_step(
    first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]
) -> FirstStep | None:
    """Return the first step that both have and at which their fingerprints differ; None if they never do."""
    before = None
    for step in sorted(first.keys() & second.keys()):
        mine = first[step]
        other = second[step]
        parts = [part for part in PARTS if mine[part] != other[part]]
        if parts:
            losses = (_as_float(mine["loss"]), _as_float(other["loss"]))
            return FirstStep(step, parts, losses, before)
        before = step
    return None


def _as_float(digits: str | None) -> float | None:
    if digits is None:
        return None
    number: tuple[float] = struct.unpack(">d", bytes.fromhex(digits))
    return number[0]


def find_in_replay(
    first: Path, second: Path, found: FirstStep, replay: Replay
) -> tuple[int, FirstDifference] | None:
    """Run steps of both runs once more, and return the first one that differs, and where it does.

    Between the last step that is known to be equal and the first that is not, it halves the distance each time.

    Args:
        first: the record of a run.
        second: that of another one.
        found: the first step with fingerprints that differ.
        replay: runs a step once more.

    Returns:
        None if what differed then does not differ now.
    """
    low = found.before or 0
    high = max(found.step, 1)
    where = None
    while high - low > 1:
        middle = (low + high) // 2
        seen = compare_traces(replay(first, middle), replay(second, middle))
        if seen is None:
            low = middle
        else:
            high = middle
            where = seen
    if where is None:
        where = compare_traces(replay(first, high), replay(second, high))
    return None if where is None else (high, where)


def first_logged_difference(
    first: Path, second: Path
) -> tuple[int, str, float, float] | None:
    """Return the first logged value that differs between two records: its step and name, and both values.

    What monitors measure, such as times, is left out.
    """
    mine = _read_logged(first)
    other = _read_logged(second)
    for (step, name), value in mine.items():
        found = other.get((step, name), value)
        if found != value:
            return step, name, value, found
    return None


def _read_logged(record: Path) -> dict[tuple[int, str], float]:
    found = {}
    for row in read_rows(record / METRICS_FILE):
        for name, value in row["values"].items():
            if not name.startswith("monitor/"):
                found[row["step"], name] = value
    return found
