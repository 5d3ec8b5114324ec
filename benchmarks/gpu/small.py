"""What the loop itself costs a step of a model so small that the device does nothing most of the time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from ..report import Table
from ..step_overhead import TARGETS
from .device import IS_REHEARSAL
from .models import SmallModel, small_loader
from .part import Part
from .rounds import (
    EVERYBODY,
    Clock,
    Contender,
    Found,
    Plan,
    judge,
    median,
    mixed,
    notes,
    over_in_microseconds,
    peers,
    shown,
    take_turns,
    train,
)

FIRST, EVERY, WINDOWS = (5, 10, 2) if IS_REHEARSAL else (200, 500, 4)
PRECISION = "32-true"
BY_HAND = Contender("raw", full=False)
# What it costs over itself is what these figures leave to chance.
AGAIN = Contender("raw", full=False, note="again")


def contenders() -> list[Contender]:
    rows = [BY_HAND, AGAIN]
    for name in peers(*EVERYBODY[1:]):
        rows.append(Contender(name, full=False, note="bare"))
        rows.append(Contender(name, note="with logger, bar and checkpoints"))
    return rows


def measure_one(contender: Contender) -> Found:
    clock = Clock(FIRST, EVERY, WINDOWS)
    data = partial(small_loader, clock.steps)
    train(contender, mixed(SmallModel), data, clock, PRECISION)
    return clock.found()


def measure(plan: Plan) -> Iterator[Found]:
    yield from take_turns(contenders(), measure_one, plan)


def tabulate(found: list[Found]) -> Table:
    cells = []
    for row in contenders():
        over = over_in_microseconds(found, row, BY_HAND)
        middle = statistics.median(over) if over else None
        quartiles = "–"
        if len(over) > 1:
            low, _, high = statistics.quantiles(over, n=4)
            quartiles = f"{low:.1f} – {high:.1f}"
        target = TARGETS.get(row.name, {}).get(row.full)
        aim = judge(middle, target, " µs")
        seconds = median(found, row, "step_s")
        cells.append([row.title, shown(seconds, ".1f", 1e6), shown(middle, "+.1f"), quartiles, *aim])  # fmt: skip
    return Table(
        "GPU: time of a step of a small model over the raw loop's",
        ("", "µs a step", "over the raw loop, µs", "quartiles", "target", ""),
        cells,
        {"found": found},
        ["Accelerate has no checkpoints here.", *notes(found, contenders())],
    )


PART = Part("small", 35, measure, tabulate)
