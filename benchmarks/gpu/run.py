"""All parts, one after the other, each in a process of its own: what it measures it writes down at once, line by line.

A part that is at the end of its time is stopped, and what it has measured until then counts. What it leaves of its
time, later ones may use.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..report import Table
from ..terminal import run_in_terminal
from . import images, language, marked_tests, overlap, saves, sequences, small, syncs
from .device import IS_REHEARSAL, about
from .part import Part
from .rounds import Found, Plan

PARTS = (
    language.EAGER,
    language.COMPILED,
    images.PART,
    sequences.PART,
    small.PART,
    syncs.PART,
    overlap.PART,
    saves.PART,
    marked_tests.PART,
)
ROUNDS = 7  # at most
# Where the code is rehearsed, the machine may be slow and do other things: a part may take so many times its time.
PATIENCE = 5 if IS_REHEARSAL else 1
# Of its time, after which a part begins nothing new.
SOFT = 0.85

REFUSED = "gpu needs a CUDA device, and torch finds none here; --quick rehearses its code on the CPU"
NO_PAGE = "what gpu measures without CUDA is a rehearsal, whose figures mean nothing: no --markdown"
REHEARSAL = "This is a rehearsal of the code on a CPU. Its figures mean nothing."


def refusal(quick: bool, writes_page: bool) -> str | None:
    """Why this machine does not do what is asked; None if it does."""
    if not IS_REHEARSAL:
        return None
    if not quick:
        return REFUSED
    return NO_PAGE if writes_page else None


# -- in a process of its own ----------------------------------------------------------------------------------------


def work(name: str, file: str, rounds: int, seconds: float) -> None:
    """Measure one part, and write each measurement to the file as a line of JSON."""
    part = next(part for part in PARTS if part.name == name)
    plan = Plan(rounds, time.monotonic() + seconds)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with open(file, "a", encoding="utf-8") as lines:
        for found in ({"device": about()}, *part.measure(plan)):
            lines.write(json.dumps(found) + "\n")
            lines.flush()


# -- in the parent --------------------------------------------------------------------------------------------------


def run_part(part: Part, rounds: int, seconds: float) -> tuple[list[Found], str]:
    """What a part has measured, and what has kept it from measuring more."""
    trouble = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.jsonl")
        file.touch()
        command = (
            sys.executable, "-m", __name__, part.name, str(file), str(rounds), str(SOFT * seconds),
        )  # fmt: skip
        try:
            if not run_in_terminal(part.name, command, on_device=True, limit=seconds):
                trouble = f"Stopped after {seconds:.0f} s: this is what was measured until then."
        except RuntimeError as error:
            trouble = f"Ended early. {str(error).strip().splitlines()[-1].strip()}"
            print(error, file=sys.stderr)
        text = file.read_text(encoding="utf-8")
    # A line that is not whole was being written when the part was stopped.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in lines], trouble


def compare(
    rounds: int | None, quick: bool, only: str = ""
) -> Iterator[tuple[str, Table]]:
    """Run the parts with such a name; gives each one's name and table as it is done."""
    began = time.monotonic()
    allowed = 0.0
    if IS_REHEARSAL:
        print(f"\n{REHEARSAL}")
    for part in PARTS:
        if not re.search(only, part.name):
            continue
        if IS_REHEARSAL and part.needs:
            print(f"\n{part.name} is left out: {part.needs}.", flush=True)
            continue
        allowed += PATIENCE * part.seconds
        seconds = allowed - (time.monotonic() - began)
        found, trouble = run_part(part, rounds or (1 if quick else ROUNDS), seconds)
        yield f"gpu_{part.name}", finish(part.tabulate(found), found, trouble)


def finish(table: Table, found: list[Found], trouble: str) -> Table:
    """Say what the table was measured on, and whether all of it was."""
    device = next((each["device"] for each in found if "device" in each), "unknown")
    has_failed = any(each.get("code") for each in found) or bool(trouble)
    marks = {"device": device, "gpu_failed": has_failed, "rehearsal": IS_REHEARSAL}
    title = f"Rehearsal on a CPU, no figures: {table.title}" if IS_REHEARSAL else table.title  # fmt: skip
    told = [f"Device: {device}.", *table.notes]
    if trouble:
        told.append(trouble)
    return replace(table, title=title, notes=told, figures={**table.figures, **marks})


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
