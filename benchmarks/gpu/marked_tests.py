"""The tests that need a CUDA device: how many of them pass."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

from ..report import Table
from ..terminal import ROOT
from .device import IS_REHEARSAL
from .part import Part
from .rounds import Found, Plan

# Looking through all tests takes half a minute, which a rehearsal has no use for.
FILES = ("tests/framework/test_device_input.py",) if IS_REHEARSAL else ()
COMMAND = ("pytest", "-m", "gpu", "-q", *FILES)
OUTCOMES = ("passed", "failed", "error", "skipped")


def counts_of(output: str) -> dict[str, int]:
    """By outcome, from pytest's last line."""
    last = output.strip().rpartition("\n")[2]
    told = re.findall(r"(\d+) (passed|failed|error|skipped)", last)
    return {outcome: int(number) for number, outcome in told}


def measure(plan: Plan) -> Iterator[Found]:
    try:
        ended = subprocess.run(
            (sys.executable, "-m", *COMMAND), cwd=ROOT, check=False, timeout=plan.left(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        yield {"error": f"not at an end after {error.timeout:.0f} s"}
        return
    lines = ended.stdout.strip().splitlines()
    told = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    found = {"code": ended.returncode, "counts": counts_of(ended.stdout), "told": told}
    if not found["counts"]:
        found["error"] = lines[-1] if lines else "pytest said nothing"
    yield found


def tabulate(found: list[Found]) -> Table:
    ran = next((each for each in found if "code" in each or "error" in each), {})
    counts = ran.get("counts", {})
    cells = [" ".join(COMMAND), *(str(counts.get(each, 0)) for each in OUTCOMES)]
    told = [*ran.get("told", ())]
    if "error" in ran:
        told.append(f"It could not be told how they end: {ran['error']}.")
    return Table(
        "GPU: tests that are marked `gpu`",
        ("", *OUTCOMES),
        [cells],
        {"found": found},
        told,
    )


PART = Part("marked_tests", 70, measure, tabulate)
