"""How much of the time in which batches are copied to the device it computes as well, from a trace of some steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import profiler

from ..report import Table
from .device import IS_REHEARSAL
from .models import PICTURES, ImageModel, image_loader
from .part import Part
from .rounds import (
    EVERYBODY,
    Contender,
    Found,
    Plan,
    median,
    mixed,
    notes,
    peers,
    shown,
    take_turns,
    train,
)

FIRST, STEPS = (2, 2) if IS_REHEARSAL else (15, 15)
PRECISION = "bf16-mixed"
# Smaller copies are not those of batches.
LEAST_BYTES = PICTURES.bytes // 2
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")

Span = tuple[float, float]  # from, to


def union(spans: Sequence[Span]) -> list[Span]:
    """The same times in spans that do not overlap, in order."""
    whole: list[Span] = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


def shared_time(some: Sequence[Span], others: Sequence[Span]) -> float:
    """How long both some and others go on."""
    busy = union(others)
    return sum(
        max(0.0, min(end, until) - max(start, since))
        for start, end in union(some)
        for since, until in busy
    )


def read_trace(file: Path) -> Found:
    """What a trace in Chrome's format tells of copies of batches, and of the host's waits. Times in µs."""
    events = json.loads(file.read_text())["traceEvents"]
    copies: list[Span] = []
    kernels: list[Span] = []
    waits = 0
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X":
            continue
        span = (event["ts"], event["ts"] + event["dur"])
        if kind == "kernel":
            kernels.append(span)
        elif kind == "gpu_memcpy" and "HtoD" in name:
            if event["args"].get("bytes", 0) >= LEAST_BYTES:
                copies.append(span)
        elif name in WAITS:
            waits += 1
    copied = sum(end - start for start, end in copies)
    overlapped = shared_time(copies, kernels)
    return {
        "copies": len(copies),
        "copied_us": copied,
        "overlapped_us": overlapped,
        "overlap": overlapped / copied if copied else None,
        "waits": waits,
    }


class Trace:
    """Traces from one step to a later one."""

    def __init__(self) -> None:
        self.found: Found = {}
        self._profiler: Any = None

    def look(self, batch_idx: int) -> None:
        if batch_idx == FIRST:
            kinds = profiler.ProfilerActivity
            kind = kinds.CPU if IS_REHEARSAL else kinds.CUDA
            self._profiler = profiler.profile(activities=[kind])
            self._profiler.__enter__()
        elif batch_idx == FIRST + STEPS:
            self._profiler.__exit__(None, None, None)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "trace.json")
                self._profiler.export_chrome_trace(str(file))
                self.found = read_trace(file)


def measure_one(contender: Contender) -> Found:
    trace = Trace()
    data = partial(image_loader, FIRST + STEPS + 5)
    train(contender, mixed(ImageModel), data, trace.look, PRECISION)
    return trace.found


def contenders() -> list[Contender]:
    return [*map(Contender, peers(*EVERYBODY))]


def measure(plan: Plan) -> Iterator[Found]:
    yield from take_turns(contenders(), measure_one, Plan(1, plan.until))


def tabulate(found: list[Found]) -> Table:
    cells = []
    for row in contenders():
        each = {kind: median(found, row, kind) for kind in ("copies", "copied_us", "overlap", "waits")}  # fmt: skip
        cells.append([
            row.title, shown(each["copies"], ".0f"), shown(each["copied_us"], ".2f", 1e-3),
            shown(each["overlap"], ".0%"), shown(each["waits"], ".0f"),
        ])  # fmt: skip
    return Table(
        f"GPU: copies of batches to the device beside its kernels, in {STEPS} steps on images",
        ("", "copies", "ms of copies", "of these beside kernels", "waits of the host"),
        cells,
        {"found": found},
        [
            f"From a trace of torch.profiler. Copies of at least {LEAST_BYTES / 1e6:g} MB; waits are calls of "
            f"{' and '.join(WAITS)}.",
            *notes(found, contenders())[1:],
        ],
    )


PART = Part("overlap", 30, measure, tabulate, "a trace of kernels and copies is CUDA's")
