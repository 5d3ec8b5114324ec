"""Three hundred steps of the DistilBERT-shaped model that the benchmark of processes has, in 16-mixed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from torch.utils.data import DataLoader

from .. import ddp
from ..report import Table
from ..step_overhead import TARGETS
from .device import IS_REHEARSAL
from .part import Part
from .rounds import (
    EVERYBODY,
    Clock,
    Contender,
    Found,
    Plan,
    gigabytes,
    judge,
    median,
    mixed,
    notes,
    over_in_microseconds,
    peers,
    ratio,
    shown,
    take_turns,
    train,
)

FIRST, EVERY, WINDOWS = (2, 1, 2) if IS_REHEARSAL else (20, 50, 6)
STEPS = EVERY * WINDOWS
PRECISION = "16-mixed"
# On a CPU, 16-bit floats are slow.
BATCH = 2 if IS_REHEARSAL else ddp.BATCH
BY_HAND, AGAIN = Contender("raw"), Contender("raw", note="again")


def contenders() -> list[Contender]:
    return [*map(Contender, peers(*EVERYBODY)), AGAIN]


def loader(steps: int) -> DataLoader:
    data = ddp.dataset(steps)
    return DataLoader(data, BATCH, pin_memory=not IS_REHEARSAL)


def measure_one(contender: Contender) -> Found:
    clock = Clock(FIRST, EVERY, WINDOWS)
    data = partial(loader, clock.steps)
    train(contender, mixed(ddp.Steps), data, clock, PRECISION)
    return clock.found()


def measure(plan: Plan) -> Iterator[Found]:
    yield from take_turns(contenders(), measure_one, plan)


def tabulate(found: list[Found]) -> Table:
    cells = []
    for row in contenders():
        seconds = median(found, row, "step_s")
        over = over_in_microseconds(found, row, BY_HAND)
        middle = statistics.median(over) if over else None
        target = TARGETS["loopwright"][True] if row.name == "loopwright" else None
        aim = judge(middle, target, " µs")
        cells.append([
            row.title, shown(seconds, ".3f", 1e3), shown(seconds, ".2f", STEPS), ratio(found, row, BY_HAND),
            shown(middle, "+.1f"), *aim, gigabytes(median(found, row, "peak")),
        ])  # fmt: skip
    header = (
        "", "ms a step", f"{STEPS} steps, s", "ratio", "over the raw loop, µs", "target", "", "peak, GB",
    )  # fmt: skip
    return Table(
        f"GPU: steps of the DistilBERT-shaped model, batches of {BATCH}, 16-mixed",
        header,
        cells,
        {"found": found},
        [
            "The Trainers log, draw a bar and save; Accelerate logs and draws one; the raw loop does none of it.",
            *notes(found, contenders()),
        ],
    )


PART = Part("sequences", 35, measure, tabulate)
