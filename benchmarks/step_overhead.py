"""What a step costs over that of a raw loop, in microseconds.

Each contender is measured in processes of its own, beside a raw loop in the same process: other contenders' imports
and settings cannot disturb it, and what differs from process to process (memory layout, hash seeds) is the same for
both loops of a pair and averages out over the processes. A process is pinned to one CPU, computes in one thread and
writes to a pseudo-terminal, so that progress bars draw as they would for a user; the parent reads it on another CPU.
The module itself notes the time at two of its steps. The two loops take turns in going first. Garbage collection is on,
as it is for users, and each run begins with a full one. Runs are long enough for what happens only now and then: a bar
that is drawn ten times a second, rows of values that are written once a second.

The raw loop is a contender as well: what it costs over itself is what these figures leave to chance.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .contenders import RUN, Work, installed, settle, title
from .report import Table, verdict
from .terminal import run_in_terminal

FIRST = 300  # the step at which the clock starts
LEAST = 1000  # steps that are timed, at least
PAIRS = 5  # in one process
SECONDS = {False: 0.4, True: 2.5}  # that a run is timed, bare and full
RAW_SECONDS = 0.8  # that the raw loop is, at most
DISTURBED = 0.02  # of its time, in which a run waited
# µs, bare and full
TARGETS = {
    "loopwright": {False: 5.0, True: 15.0},
    "monitored": {True: 40.0},
    "engine": {False: 5.0},
}


# -- in a process of its own ----------------------------------------------------------------------------------


def measure(name: str, full: bool, timed: int = LEAST) -> tuple[float, float]:
    """Wall-clock and CPU time of one step, in µs, over `timed` steps."""
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        RUN[name](
            Work(FIRST + timed + 1, full, folder, {FIRST: mark, FIRST + timed: mark})
        )
    wall, cpu = ((end - start) / timed * 1e6 for start, end in zip(*marks, strict=True))
    return wall, cpu


def measure_pairs(name: str, full: bool, shorter: float, cpu: int | None) -> list[Any]:
    """(raw, contender) pairs of what `measure` gives."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    settle()
    contenders = ("raw", name)
    # A first run each imports what will be needed, and tells how many steps the others take.
    timed = [
        max(LEAST, int(duration(each, full) / shorter / measure(each, full)[0] * 1e6))
        for each in contenders
    ]
    pairs = []
    for turn in range(PAIRS):
        pair: list[Any] = [None, None]
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            pair[which] = measure(contenders[which], full, timed[which])
        pairs.append(pair)
    return pairs


def duration(name: str, full: bool) -> float:
    """For how many seconds to time a run."""
    return min(SECONDS[full], RAW_SECONDS) if name == "raw" else SECONDS[full]


# -- in the parent --------------------------------------------------------------------------------------------


def start_pairs(*arguments: Any) -> list[Any]:
    """`measure_pairs` in a fresh process with a terminal of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "pairs.json")
        run_in_terminal(
            title(arguments[0]),
            (sys.executable, "-m", __name__, json.dumps(arguments), str(result)),
        )
        return json.loads(result.read_text())


def choose_cpu() -> int | None:
    """The CPU for those who are measured; this process moves to the others."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(cpus) < 2:
        return None
    os.sched_setaffinity(0, cpus - {max(cpus)})
    return max(cpus)


def compare(full: bool, rounds: int, quick: bool = False) -> Table:
    pairs: dict[str, list[Any]] = {name: [] for name in installed(full)}
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cpu = choose_cpu()
    try:
        while any(len(found) < rounds for found in pairs.values()):
            for name, found in pairs.items():
                found += start_pairs(name, full, 4 if quick else 1, cpu)
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
    return tabulate(full, pairs)


def tabulate(full: bool, pairs: dict[str, list[Any]]) -> Table:
    rows, figures = [], {}
    for name, found in pairs.items():
        low, median, high = statistics.quantiles(
            [run[0] - raw[0] for raw, run in found], n=4
        )
        cpu = statistics.median(run[1] - raw[1] for raw, run in found)
        disturbed = sum(
            any(wall > cpu * (1 + DISTURBED) for wall, cpu in pair) for pair in found
        )
        target = TARGETS.get(name, {}).get(full)
        rows.append([
            title(name), f"{median:.1f}", f"{low:.1f} – {high:.1f}", f"{cpu:.1f}", f"{disturbed} of {len(found)}",
            *verdict(median, target, " µs", noisy=disturbed > len(found) / 2),
        ])  # fmt: skip
        figures[name] = {
            "overhead_us": median, "quartiles_us": [low, high], "cpu_overhead_us": cpu, "target_us": target,
            "disturbed": disturbed, "pairs_us": found,
        }  # fmt: skip
    raw = statistics.median(pair[0][0] for found in pairs.values() for pair in found)
    kind = "with TensorBoard, progress bar and checkpointing" if full else "bare"
    return Table(
        f"Time of a step over the raw loop's, {kind}",
        ("", "µs", "quartiles", "CPU µs", "disturbed", "target", ""),
        rows,
        {"raw_us": raw, "contenders": figures},
        [
            f"The raw loop's step takes {raw:.1f} µs. Medians over pairs of runs; a pair is disturbed if a run got "
            f"no CPU for more than {DISTURBED:.0%} of its time.",
        ],
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure_pairs(*json.loads(sys.argv[1]))))
