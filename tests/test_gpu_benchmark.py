"""The benchmark of a CUDA device, as far as it can be tried without one."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.gpu import marked_tests, overlap, rounds, run, syncs
from benchmarks.gpu.images import Waiting
from benchmarks.terminal import ROOT, run_in_terminal
from tests.programs import run_program

without_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a device, so nothing is refused"
)
SLOW, FAST = rounds.Contender("raw"), rounds.Contender("loopwright")


def plan(at_most: int, seconds: float = 60) -> rounds.Plan:
    return rounds.Plan(at_most, time.monotonic() + seconds)


def test_all_parts_fit_into_ten_minutes():
    assert sum(part.seconds for part in run.PARTS) <= 600


@without_cuda
def test_what_is_not_measured_is_not_written_into_a_page():
    assert run.refusal(quick=False, writes_page=False) == run.REFUSED
    assert run.refusal(quick=True, writes_page=True) == run.NO_PAGE
    assert run.refusal(quick=True, writes_page=False) is None


def test_contenders_take_turns_and_one_that_fails_does_so_once():
    order: list[str] = []

    def measure(contender: rounds.Contender) -> rounds.Found:
        order.append(contender.name)
        if contender == FAST:
            raise ValueError("compile must be True\nor False")
        return {"step_s": 2.0}

    found = [*rounds.take_turns([SLOW, FAST], measure, plan(3))]
    assert order == ["raw", "loopwright", "raw", "raw"]
    assert rounds.median(found, SLOW, "step_s") == 2.0
    assert rounds.median(found, FAST, "step_s") is None
    told = " ".join(rounds.notes(found, [SLOW, FAST]))
    assert "failed: ValueError: compile must be True" in told


def test_nothing_begins_when_the_time_is_up():
    found = [*rounds.take_turns([SLOW], lambda contender: {}, plan(3, seconds=-1))]
    assert found == []
    assert "was left out" in rounds.notes(found, [SLOW])[-1]


def test_figures_are_compared_within_rounds():
    found = [
        {"key": row.key, "round": turn, "step_s": seconds}
        for turn, pair in enumerate([(1.0, 2.0), (10.0, 30.0), (5.0, 20.0)])
        for row, seconds in zip((SLOW, FAST), pair, strict=True)
    ]
    assert rounds.ratio(found, FAST, SLOW) == "3.000"


def test_the_clock_is_read_in_windows():
    clock = rounds.Clock(first=2, every=3, windows=2, read=lambda: 0.0)
    for batch_idx in range(clock.steps):
        clock(batch_idx)
    assert len(clock.marks) == 3
    assert len(clock.found()["windows_s"]) == 2


def test_waiting_for_a_loader_is_noted():
    class Late(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> float:
            time.sleep(0.01)
            return 0.0

    with Waiting() as waiting:
        assert len([*DataLoader(Late())]) == 3
    noted = waiting.seconds
    assert noted >= 0.03
    assert len([*DataLoader(Late())]) == 3
    assert waiting.seconds == noted, "what was put in place is taken away again"


def test_waits_of_the_host_are_counted_where_they_come_from():
    counted = syncs.Syncs()
    counted.look(syncs.FIRST)
    for _ in range(2):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    warnings.warn("another one", stacklevel=1)
    counted.look(syncs.FIRST + syncs.STEPS)
    ((where, count),) = counted.places.items()
    assert count == 2
    assert where.startswith("tests/test_gpu_benchmark.py:")
    assert where.endswith(" in test_waits_of_the_host_are_counted_where_they_come_from")


def events() -> Iterator[dict[str, Any]]:
    """Kernels from 0 to 10, from 5 to 15 and from 30 to 40 µs; copies of batches from 8 to 20, and from 38 to 42."""
    spans = {"kernel": ((0, 10), (5, 10), (30, 10)), "gpu_memcpy": ((8, 12), (38, 4))}
    for kind, those in spans.items():
        for start, duration in those:
            yield {
                "ph": "X", "cat": kind, "name": "Memcpy HtoD (Pinned -> Device)", "ts": start, "dur": duration,
                "args": {"bytes": 2 * overlap.LEAST_BYTES},
            }  # fmt: skip
    small = {"bytes": 4}
    yield {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 0, "dur": 9, "args": small}  # fmt: skip
    yield {"ph": "X", "cat": "cuda_runtime", "name": overlap.WAITS[0], "ts": 0, "dur": 1}  # fmt: skip
    yield {"ph": "M", "name": "process_name"}


def test_copies_beside_kernels_are_read_from_a_trace(tmp_path: Path):
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": [*events()]}))
    assert overlap.read_trace(file) == {
        "copies": 2, "copied_us": 16, "overlapped_us": 9, "overlap": 9 / 16, "waits": 1,
    }  # fmt: skip


def test_pytests_last_line_is_understood():
    output = "FAILED tests/a.py::b\n2 failed, 10 passed, 1 skipped, 3600 deselected in 9.11s\n"
    assert marked_tests.counts_of(output) == {"failed": 2, "passed": 10, "skipped": 1}
    assert marked_tests.counts_of("no tests ran in 0.1s") == {}


def test_what_takes_too_long_is_killed():
    program = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    assert not run_in_terminal("sleep", (sys.executable, "-c", program), limit=0.5)
    assert time.monotonic() - began < 20


@without_cuda
@pytest.mark.slow
def test_the_rehearsal():
    """Of two parts: contenders that train, and those that save in fresh processes."""
    only = "^(small|saves|syncs)$"
    command = ("-m", "benchmarks", "gpu", "--quick", "--only", only)
    ended = run_program(*command, timeout=350, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert run.REHEARSAL in ended.stdout
    assert "syncs is left out: " in ended.stdout
    titles = re.findall("^### (.*)", ended.stdout, re.MULTILINE)
    assert len(titles) == 2
    assert all(title.startswith("Rehearsal on a CPU") for title in titles)
    assert " failed: " not in ended.stdout
