"""Contenders take turns in rounds, as long as there is time, and a clock is read in their steps."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import contenders
from ..report import verdict
from .device import IS_REHEARSAL, begin_peak, peak, tidy, wait
from .loops import RUN, Work
from .models import Look

Found = dict[str, Any]  # what one measurement gives, to be written as a line of JSON


@dataclass(frozen=True)
class Plan:
    """How long a part may take.

    Attributes:
        rounds: at most.
        until: when no further contender begins, on the clock of `time.monotonic`.
    """

    rounds: int
    until: float

    def left(self) -> float:
        """In seconds."""
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        name: of the loop.
        compiled: as in `Work`.
        full: as in `Work`.
        note: tells rows of one loop apart.
    """

    name: str
    compiled: str = ""
    full: bool = True
    note: str = ""

    @property
    def key(self) -> str:
        extent = "full" if self.full else "bare"
        return ", ".join(filter(None, (self.name, self.compiled, extent, self.note)))

    @property
    def title(self) -> str:
        title = contenders.title(self.name)
        return f"{title}, {self.note}" if self.note else title


def peers(*names: str) -> list[str]:
    """Those that are installed here."""
    there = contenders.installed()
    return [name for name in names if name in there]


EVERYBODY = ("raw", "loopwright", "lightning", "accelerate")


class Clock:
    """Reads the time when the device has done all that it was given: at a first step, and then every so many.

    Args:
        first: the step at which it begins.
        every: steps in a window of time.
        windows: how many of these.
        read: another quantity that grows, in seconds.
    """

    def __init__(
        self,
        first: int,
        every: int,
        windows: int,
        read: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.first = first
        self.every = every
        self.last = first + every * windows
        self.read = read
        self.began = time.perf_counter()
        self.marks: list[tuple[float, float]] = []
        self.peak = 0

    @property
    def steps(self) -> int:
        """How many steps the training needs: what reads ahead must not be at the end yet when the clock stops."""
        return self.last + 5

    def __call__(self, batch_idx: int) -> None:
        since = batch_idx - self.first
        if since < 0 or since % self.every or batch_idx > self.last:
            return
        wait()
        if since == 0:
            begin_peak()
        self.marks.append((time.perf_counter(), self.read()))
        if batch_idx == self.last:
            self.peak = peak()

    def found(self) -> Found:
        """What was read: seconds of a step, the share of the other quantity, bytes, seconds until the clock began."""
        first, last = self.marks[0], self.marks[-1]
        windows = [
            (end[0] - start[0]) / self.every
            for start, end in zip(self.marks, self.marks[1:], strict=False)
        ]
        return {
            "windows_s": windows,
            "step_s": statistics.median(windows),
            "share": (last[1] - first[1]) / (last[0] - first[0]),
            "peak": self.peak,
            "start_s": first[0] - self.began,
        }


@dataclass
class Said(logging.Handler):
    """Keeps what Loopwright tells of compiling, such as why it has not done it."""

    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if "compile" in line:
            self.lines.append(line)


def train(
    contender: Contender,
    module: Callable[[type, Look, bool], Any],
    data: Callable[[], Any],
    look: Look,
    precision: str,
) -> Found:
    """Let a contender train for one epoch; returns what was said of compiling."""
    said = Said()
    logger = logging.getLogger("loopwright")
    logger.addHandler(said)
    try:
        with tempfile.TemporaryDirectory() as folder:
            RUN[contender.name](
                Work(
                    lambda base: module(base, look, contender.full),
                    data,
                    precision,
                    contender.full,
                    contender.compiled,
                    folder,
                )
            )
    finally:
        logger.removeHandler(said)
    return {"said": said.lines} if said.lines else {}


def mixed(steps: type) -> Callable[[type, Look, bool], Any]:
    """Makes modules of the user's code and a contender's base class."""
    return lambda base, look, full: type("Model", (steps, base), {})(look, full)


def attempt(measure: Callable[[Contender], Found], contender: Contender) -> Found:
    """Measure a contender; one that fails has its error in the place of figures, and the others go on."""
    try:
        found = measure(contender)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        found = {"error": f"{type(error).__name__}: {first_line}"}
    tidy()
    return {"key": contender.key, **found}


def take_turns(
    rows: Sequence[Contender], measure: Callable[[Contender], Found], plan: Plan
) -> Iterator[Found]:
    """Measure all in rounds: A B C, C B A, and so on.

    Another round begins only if there is time for all of it; in the first one, contenders that come too late are left
    out.
    """
    failed: set[str] = set()
    for turn in range(plan.rounds):
        began = time.monotonic()
        for row in rows if turn % 2 == 0 else reversed(rows):
            if row.key in failed:
                continue
            if plan.left() <= 0:
                return
            found = attempt(measure, row)
            if "error" in found:
                failed.add(row.key)
            yield {"round": turn, **found}
        if plan.left() < time.monotonic() - began:
            return


# -- what was found -----------------------------------------------------------------------------------------------


def of(found: Sequence[Found], row: Contender, kind: str) -> dict[int, Any]:
    """A row's figures of one kind, by round; none if it failed or was left out."""
    return {
        each["round"]: each[kind]
        for each in found
        if each.get("key") == row.key and kind in each
    }


def median(found: Sequence[Found], row: Contender, kind: str) -> float | None:
    values = [*of(found, row, kind).values()]
    return statistics.median(values) if values else None


def against(
    found: Sequence[Found],
    row: Contender,
    other: Contender,
    kind: str,
    compare: Callable[[float, float], float],
) -> list[float]:
    """A row's figures compared with another's in the same rounds."""
    own, theirs = of(found, row, kind), of(found, other, kind)
    return [
        compare(own[turn], theirs[turn]) for turn in sorted(own.keys() & theirs.keys())
    ]


def over_in_microseconds(
    found: list[Found], row: Contender, base: Contender
) -> list[float]:
    """How much longer a contender's step takes than another's, in each round."""
    return against(found, row, base, "step_s", lambda own, other: (own - other) * 1e6)


def ratio(found: Sequence[Found], row: Contender, other: Contender) -> str:
    ratios = against(found, row, other, "step_s", lambda own, theirs: own / theirs)
    return f"{statistics.median(ratios):.3f}" if ratios else ""


def shown(value: float | None, pattern: str, factor: float = 1.0) -> str:
    """A figure as text; a dash where there is none."""
    return "–" if value is None else format(value * factor, pattern)


def gigabytes(value: float | None) -> str:
    """Memory of the device; a dash in a rehearsal, where it is not counted."""
    return shown(value or None, ".2f", 1e-9)


def judge(value: float | None, target: float | None, unit: str = "") -> tuple[str, str]:
    """A target and whether it is met, which a rehearsal does not tell."""
    if target is None:
        return "", ""
    if value is None:
        return f"≤ {target:g}{unit}", "–"
    text, outcome = verdict(value, target, unit)
    return text, "rehearsed" if IS_REHEARSAL else outcome


def notes(found: Sequence[Found], rows: Sequence[Contender]) -> list[str]:
    """How many rounds there were, who failed or was left out, and what was said of compiling."""
    counts = {each["round"] for each in found if "round" in each}
    told = [f"Medians of rounds, of which there were {len(counts)}."]
    for row in rows:
        mine = [each for each in found if each.get("key") == row.key]
        errors = dict.fromkeys(each["error"] for each in mine if "error" in each)
        told += [f"{row.title} ({row.key}) failed: {error}" for error in errors]
        said = dict.fromkeys(line for each in mine for line in each.get("said", ()))
        told += [f"{row.title} ({row.key}) said: {line}" for line in said]
        if not mine:
            told.append(f"{row.title} ({row.key}) was left out: the time was up.")
    return told
