"""How often the host waits for the device in the middle of a training, and where."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..report import Table
from ..terminal import ROOT
from .device import IS_REHEARSAL
from .models import SmallModel, small_loader
from .part import Part
from .rounds import (
    EVERYBODY,
    Contender,
    Found,
    Plan,
    judge,
    mixed,
    notes,
    of,
    peers,
    take_turns,
    train,
)

FIRST, STEPS = (5, 5) if IS_REHEARSAL else (70, 50)
PRECISION = "bf16-mixed"
TARGET = 0
# Frames of these tell how it is done, and not who asks for it.
MACHINERY = (str(Path(torch.__file__).parent), warnings.__file__, __file__)


def place(frames: traceback.StackSummary) -> str:
    """The innermost frame that is not torch's, as `folder/file.py:line in function`."""
    asking = [frame for frame in frames if not frame.filename.startswith(MACHINERY)]
    if not asking:
        return "a thread of torch's"
    frame = asking[-1]
    parts = Path(frame.filename).parts
    file = Path(frame.filename)
    if file.is_relative_to(ROOT):
        file = file.relative_to(ROOT)
    elif "site-packages" in parts:
        file = Path(*parts[parts.index("site-packages") + 1 :])
    return f"{file}:{frame.lineno} in {frame.name}"


class Syncs:
    """Counts, by place, the warnings of waiting hosts that torch gives from one step to a later one."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._caught: Any = None

    def look(self, batch_idx: int) -> None:
        if batch_idx == FIRST:
            self.begin()
        elif batch_idx == FIRST + STEPS:
            self.end()

    def begin(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self.note
        if not IS_REHEARSAL:
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        if not IS_REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
        if self._caught is not None:
            self._caught.__exit__(*sys.exc_info())
        self._caught = None

    def note(self, message: Any, *others: Any, **options: Any) -> None:
        if "synchronizing CUDA" in str(message):
            self.places[place(traceback.extract_stack())] += 1


def measure_one(contender: Contender) -> Found:
    syncs = Syncs()
    data = partial(small_loader, FIRST + STEPS + 10)
    try:
        train(contender, mixed(SmallModel), data, syncs.look, PRECISION)
    finally:
        # Where the training has failed in between.
        syncs.end()
    return {"count": syncs.places.total(), "places": dict(syncs.places)}


def contenders() -> list[Contender]:
    return [*map(Contender, peers(*EVERYBODY))]


def measure(plan: Plan) -> Iterator[Found]:
    yield from take_turns(contenders(), measure_one, Plan(1, plan.until))


def tabulate(found: list[Found]) -> Table:
    cells, places = [], []
    for row in contenders():
        counts = [*of(found, row, "count").values()]
        count = counts[0] if counts else None
        is_ours = row.name == "loopwright"
        aim = judge(count, TARGET if is_ours else None)
        cells.append([row.title, "–" if count is None else str(count), *aim])
        for by_place in of(found, row, "places").values():
            told = [f"{number} × {where}" for where, number in by_place.items()]
            places += [f"{row.title}: {'; '.join(told)}."] if told else []
    return Table(
        f"GPU: how often the host waits for the device, in {STEPS} steps of a training",
        ("", "waits", "target", ""),
        cells,
        {"found": found},
        [
            "As `torch.cuda.set_sync_debug_mode` counts them, with the callbacks that are there by default, a logger "
            "and a bar. Waits for an event it does not see; the table of copies counts them.",
            *places,
            *notes(found, contenders())[1:],
        ],
    )


PART = Part("syncs", 25, measure, tabulate, "the sync debug mode is CUDA's")
