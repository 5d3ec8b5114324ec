"""Rows of numbers that other loggers leave: CSV, JSON lines, and the trainer_state.json of Hugging Face's trainer."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .run import Run
from .series import as_number

# Columns that say where a row belongs, in the spellings of Loopwright, Lightning, Hugging Face, Keras and W&B.
STEP_NAMES = ("step", "global_step", "_step", "steps", "iteration", "iter")
TIME_NAMES = ("time", "timestamp", "_timestamp", "wall_time", "created_at")
# Times before 2001 are no times since 1970, but seconds of something else.
EARLIEST_TIME = 1e9


def read_csv(file: Path, run: Run) -> None:
    """Add the rows of a CSV file to a run."""
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        # A NUL byte is what a crash of the machine leaves of unwritten blocks.
        rows = csv.DictReader(line.replace("\0", "") for line in lines)
        add_rows(run, rows)


def read_json_lines(file: Path, run: Run) -> None:
    """Add the rows of a file of JSON lines to a run: flat ones, or with the values under ``values``."""
    add_rows(run, json_lines(file, run.problems))


def read_trainer_state(file: Path, run: Run) -> None:
    """Add the rows of a trainer_state.json to a run."""
    state = json.loads(file.read_text(encoding="utf-8"))
    add_rows(run, state.get("log_history", []))
    best = state.get("best_model_checkpoint")
    if best:
        score = {"best_metric": state.get("best_metric")}
        run.record["checkpoints"] = [{"path": best, "scores": score}]


def json_lines(file: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Read the objects of a file of JSON lines.

    Args:
        file: its path. The last line may be cut short, as a kill leaves it.
        problems: gets a line if others are damaged, too; they are left out.
    """
    damaged = 0
    last_is_damaged = False
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            last_is_damaged = not isinstance(row, dict)
            if isinstance(row, dict):
                yield row
            else:
                damaged += 1
    if damaged > last_is_damaged:
        problems.append(f"{file.name}: {damaged} lines are no JSON and were left out")


def add_rows(run: Run, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a run. One without a step gets one more than the row before."""
    step = -1.0
    for row in rows:
        given = _first(row, STEP_NAMES)
        step = step + 1 if given is None else given
        time = _first(row, TIME_NAMES)
        time = math.nan if time is None or time < EARLIEST_TIME else time
        run.note_epoch(as_number(row.get("epoch")), step)
        nested = row.get("values")
        if isinstance(nested, dict):
            values = nested
        else:
            values = row
        _add_values(run, values, step, time)


def _add_values(run: Run, values: dict[str, Any], step: float, time: float) -> None:
    for name, value in values.items():
        if not isinstance(name, str) or name in STEP_NAMES or name in TIME_NAMES:
            continue
        number = as_number(value)
        if number is not None:
            if name != "epoch":
                run.add(name, step, number, time)
        elif value not in (None, ""):
            _add_other(run, name, value, step)


def _add_other(run: Run, name: str, value: Any, step: float) -> None:
    """Add a text, a table, a histogram or files, as JSONLinesLogger writes them."""
    if isinstance(value, dict) and {"columns", "rows"} <= set(value):
        run.add_media(step, name, "table", value=value)
    elif isinstance(value, dict) and {"counts", "edges"} <= set(value):
        run.add_media(step, name, "histogram", value=value)
    elif isinstance(value, list) and value and all(map(_is_media_file, value)):
        kind = "audio" if value[0].endswith(".wav") else "image"
        for file in value:
            run.add_media(step, name, kind, file=file)
    elif isinstance(value, str):
        run.add_media(step, name, "text", value=value)


def _is_media_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("media/")


def _first(row: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """Return the first of these columns that is a number."""
    for name in names:
        number = as_number(row.get(name))
        if number is not None and math.isfinite(number):
            return number
    return None
