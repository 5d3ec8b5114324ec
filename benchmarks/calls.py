"""How many Python functions a bare step calls, and how many frames lie between `fit` and the user's step."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from types import FrameType
from typing import Any, NamedTuple

from .contenders import RUN, Work, installed, title
from .report import Table, verdict

FIRST, STEPS = 200, 100  # profile so many steps from this one on
MAX_CALLS, MAX_FRAMES = 220, 5


class Counts(NamedTuple):
    calls: float  # of Python functions in a step, its own included
    frames: int  # between the contender's entry point, such as `fit`, and the user's training_step


def count(name: str, full: bool = False) -> Counts:
    """Count in a run of a contender."""
    calls = frames = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    def look() -> None:
        nonlocal frames
        frames = frames_above(sys._getframe(1), RUN[name].__name__)

    def start() -> None:
        sys.setprofile(profile)

    def stop() -> None:
        sys.setprofile(None)

    probes = {FIRST - 1: look, FIRST: start, FIRST + STEPS: stop}
    with tempfile.TemporaryDirectory() as folder:
        RUN[name](Work(FIRST + STEPS + 10, full, folder, probes))
    return Counts((calls - 1) / STEPS, frames)  # one of them was `stop`


def frames_above(step: FrameType, caller: str) -> int:
    """How many frames lie between a step and the entry point that the function `caller` calls."""
    frames, frame = 0, step.f_back
    while frame is not None and frame.f_code.co_name != caller:
        frames, frame = frames + 1, frame.f_back
    return max(0, frames - 1)  # without the entry point itself


def compare() -> Table:
    found: dict[str, Counts] = {}
    for name in installed():
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            found[name] = count(name)
    rows = []
    for name, counts in found.items():
        ours = name == "loopwright"
        rows.append([
            title(name),
            f"{counts.calls:.0f}", *verdict(counts.calls, MAX_CALLS if ours else None),
            f"{counts.frames}", *verdict(counts.frames, MAX_FRAMES if ours else None),
        ])  # fmt: skip
    return Table(
        "Python calls in a bare step, and frames between `fit` and the user's step",
        ("", "calls", "target", "", "frames", "target", ""),
        rows,
        {name: counts._asdict() for name, counts in found.items()},
    )
