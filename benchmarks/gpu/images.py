"""Steps on images that workers read, and how long the loop waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.utils.data import dataloader

from ..report import Table
from .device import IS_REHEARSAL
from .models import (
    PICTURES,
    ImageModel,
    count_workers,
    image_loader,
    repeated_images,
)
from .part import Part
from .rounds import (
    EVERYBODY,
    Clock,
    Contender,
    Found,
    Plan,
    gigabytes,
    median,
    mixed,
    notes,
    peers,
    ratio,
    shown,
    take_turns,
    train,
)

FIRST, EVERY, WINDOWS = (2, 1, 2) if IS_REHEARSAL else (15, 10, 4)
PRECISION = "bf16-mixed"
BY_HAND = Contender("raw")
WITHOUT_LOADER = Contender("raw", note="one batch again and again, on the device")


class Waiting:
    """How long the thread that trains has been inside torch's DataLoader, whoever asks it, since it was entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds

    def __enter__(self) -> Waiting:
        self._kind: Any = dataloader._BaseDataLoaderIter
        self._next = self._kind.__next__
        inner, trains = self._next, threading.current_thread()

        def next_batch(iterator: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(iterator)
            finally:
                if threading.current_thread() is trains:
                    self.seconds += time.perf_counter() - began

        self._kind.__next__ = next_batch
        return self

    def __exit__(self, *exception: Any) -> None:
        self._kind.__next__ = self._next


def contenders() -> list[Contender]:
    return [*map(Contender, peers(*EVERYBODY)), WITHOUT_LOADER]


def measure_one(contender: Contender) -> Found:
    with Waiting() as waiting:
        clock = Clock(FIRST, EVERY, WINDOWS, waiting.read)
        kind = repeated_images if contender == WITHOUT_LOADER else image_loader
        data = partial(kind, clock.steps)
        train(contender, mixed(ImageModel), data, clock, PRECISION)
    return clock.found()


def measure(plan: Plan) -> Iterator[Found]:
    yield {"workers": count_workers()}
    yield from take_turns(contenders(), measure_one, plan)


def tabulate(found: list[Found]) -> Table:
    cells = []
    for row in contenders():
        seconds = median(found, row, "step_s")
        rate = PICTURES.batch / seconds if seconds else None
        cells.append([
            row.title, shown(seconds, ".2f", 1e3), ratio(found, row, BY_HAND), shown(rate, ",.0f"),
            shown(median(found, row, "share"), ".1%"), gigabytes(median(found, row, "peak")),
        ])  # fmt: skip
    workers = next((each["workers"] for each in found if "workers" in each), 0)
    return Table(
        "GPU: steps on images in the shape of ResNet-50, bf16-mixed, channels_last",
        ("", "ms a step", "ratio", "images/s", "waits for data", "peak, GB"),
        cells,
        {"found": found},
        [
            f"{PICTURES}, read by {workers} worker processes. *Waits for data* is the part of the time in which the "
            "thread that trains is inside the DataLoader; the device need not wait then, if it has work left.",
            *notes(found, contenders()),
        ],
    )


PART = Part("images", 55, measure, tabulate)
