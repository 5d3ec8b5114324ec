"""What the page is given of runs: plain values, as small as they can be."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from .media import MAX_BYTES, embedded
from .run import SILENT_SECONDS, Run
from .series import Series, curve, points_for_each

# Curves that count tokens, from which the axis of tokens is made.
TOKEN_NAMES = (
    "monitor/tokens",
    "tokens",
    "num_tokens",
    "tokens_seen",
    "num_input_tokens_seen",
)
# Parts of the record that describe where a run ran.
ENVIRONMENT = ("command", "git", "hardware", "launcher", "seeds", "packages")
# How a record may call an ending, and what the page calls it.
ENDINGS = {
    "finished": "finished",
    "completed": "finished",
    "success": "finished",
    "stopped": "finished",
    "failed": "failed",
    "error": "failed",
    "exception": "failed",
    "hung": "failed",
    "killed": "killed",
    "interrupted": "interrupted",
    "preempted": "interrupted",
    "signal": "interrupted",
}
MAX_WARNINGS = 200
MAX_EPOCHS = 400


def payload(runs: list[Run], title: str) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        runs: at least one.
        title: of the page.
    """
    num_series = sum(len(run.series) for run in runs)
    max_points = points_for_each(num_series)
    shown = []
    budget = MAX_BYTES
    for run in runs:
        media, taken = embedded(run, budget)
        budget -= taken
        shown.append({**_run(run, max_points), "media": media})
    return {"title": title, "made": time.time(), "runs": shown}


def _run(run: Run, max_points: int) -> dict[str, Any]:
    record = run.record
    started = run.started
    series = {
        name: curve(series, 0.0 if math.isnan(started) else started, max_points)
        for name, series in run.series.items()
        if len(series)
    }
    return {
        "name": run.name,
        "folder": str(run.folder),
        "source": run.source,
        "status": status_of(run),
        "started": None if math.isnan(started) else started,
        "seconds": _seconds(run),
        "last_step": run.last_step,
        "epoch_ends": _epoch_ends(run),
        "tokens": _tokens(run),
        "samples_per_step": _samples_per_step(record),
        "series": series,
        "facts": _facts(record),
        "timings": timings_of(record),
        "checkpoints": _checkpoints(record),
        "config": flat(run.config),
        "environment": {
            name: _flat_or_text(record[name])
            for name in ENVIRONMENT
            if record.get(name)
        },
        "model": _model_text(record.get("model")),
        "warnings": _warnings(run),
        "attempts": [flat(each) for each in _list(record.get("attempts"))],
        "failure": _failure(run),
    }


def status_of(run: Run) -> dict[str, str]:
    """Return how a run is: ``state``, one of ``ENDINGS``' values, "running" or "unknown"; and ``text``, why."""
    ended = run.record.get("ended")
    summary = str(run.failure.get("summary", ""))
    if ended:
        how = ended.get("how") if isinstance(ended, dict) else ended
        why = ended.get("why") if isinstance(ended, dict) else ""
        how = str(how or "").lower()
        state = ENDINGS.get(how, how or "unknown")
        if state == "failed" and summary:
            why = summary
        return {"state": state, "text": str(why or "")}
    if run.failure:
        return {"state": "failed", "text": summary}
    if run.source != "record":
        return {"state": "unknown", "text": "its source does not tell how it ended"}
    silence = time.time() - run.written
    if silence > SILENT_SECONDS or _is_gone(run.record):
        text = (
            "no ending was recorded: the process was killed, or its machine went away"
        )
        return {"state": "killed", "text": text}
    return {"state": "running", "text": "its files were written a moment ago"}


def _is_gone(record: dict[str, Any]) -> bool:
    """Whether the process is known to be gone: it was one of this machine, and there is none of its number."""
    import socket

    attempts = _list(record.get("attempts"))
    place = attempts[-1] if attempts and isinstance(attempts[-1], dict) else {}
    pid = place.get("pid")
    if not isinstance(pid, int) or place.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _seconds(run: Run) -> float | None:
    """Return for how long it has run: as the record says, or from the first to the last logged value."""
    recorded = timings_of(run.record).get("run")
    if recorded:
        return recorded.get("total", sum(recorded.values()))
    lasts = [
        series.times[-1]
        for series in run.series.values()
        if len(series) and math.isfinite(series.times[-1])
    ]
    return max(lasts) - run.started if lasts else None


def _epoch_ends(run: Run) -> list[list[float]]:
    """Return pairs of an epoch and its last step; of a run with very many epochs, some."""
    ends = []
    for epoch, step in sorted(run.epoch_ends.items()):
        # What is tested after the training has the number of an epoch that did not come.
        if not ends or step > ends[-1][1]:
            ends.append((epoch, step))
    every = -(-len(ends) // 2000) if ends else 1
    return [list(pair) for pair in (*ends[:-1:every], *ends[-1:])]


def _tokens(run: Run) -> list[list[float]] | None:
    """Return pairs of a step and the tokens up to it, if a curve counts them."""
    by_speed = _tokens_by_speed(run)
    for name in TOKEN_NAMES:
        series = run.series.get(name, by_speed)
        if series is not None and _rises(series):
            shown = curve(series, 0.0, 2000)
            return [list(pair) for pair in zip(shown["x"], shown["y"], strict=True)]
    return None


def _tokens_by_speed(run: Run) -> Series | None:
    """Add up tokens from the monitors' rates: those a second, by the steps a second, are those a step."""
    tokens = run.series.get("monitor/tokens_per_second")
    rate = run.series.get("monitor/steps_per_second")
    if tokens is None or rate is None:
        return None
    rates = dict(zip(rate.steps, rate.values, strict=True))
    counted = Series()
    total = 0.0
    before = 0.0
    for step, value in zip(tokens.steps, tokens.values, strict=True):
        steps_a_second = rates.get(step) or math.inf
        total += value / steps_a_second * (step - before)
        before = step
        counted.add(step, total)
    return counted


def _rises(series: Series) -> bool:
    import numpy

    return len(series) > 1 and bool(numpy.all(numpy.diff(series.values) >= 0))


def _samples_per_step(record: dict[str, Any]) -> float | None:
    batch = record.get("batch")
    if isinstance(batch, dict):
        for name in ("effective", "global", "samples", "size"):
            if isinstance(batch.get(name), (int, float)):
                return batch[name]
    return batch if isinstance(batch, (int, float)) else None


def _facts(record: dict[str, Any]) -> list[list[str]]:
    """Return what the page's head tells of a run: pairs of a name and a text."""
    facts = []
    model = record.get("model")
    model = model if isinstance(model, dict) else {}
    batch = record.get("batch")
    for name, value in (
        ("model", model.get("name") or model.get("class")),
        ("parameters", model.get("parameters")),
        ("FLOPs", model.get("flops_per_sample") or model.get("flops")),
        ("strategy", record.get("strategy")),
        ("precision", record.get("precision")),
        ("batch", _samples_per_step(record) or batch),
    ):
        if isinstance(value, dict):
            value = value.get("name")
        if value not in (None, "", {}):
            facts.append(
                [name, value if isinstance(value, (int, float)) else str(value)]
            )
    return facts


def timings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return where the time went: ``start``, ``run`` and ``epochs``, each seconds by activity."""
    timings = record.get("timings")
    if not isinstance(timings, dict):
        return {}
    epochs = _list(timings.get("epochs"))
    every = -(-len(epochs) // MAX_EPOCHS) if epochs else 1
    return {
        "start": _seconds_by_name(timings.get("start")),
        "run": _seconds_by_name(timings.get("run")),
        "epochs": [
            {"epoch": epoch.get("epoch", index), **_seconds_by_name(epoch)}
            for index, epoch in enumerate(epochs)
            if isinstance(epoch, dict) and index % every == 0
        ],
    }


def _seconds_by_name(value: Any) -> dict[str, float]:
    if isinstance(value, (int, float)):
        return {"total": value}
    if not isinstance(value, dict):
        return {}
    return {
        name: seconds
        for name, seconds in value.items()
        if isinstance(seconds, (int, float)) and math.isfinite(seconds)
    }


def _checkpoints(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for each in _list(record.get("checkpoints")):
        if isinstance(each, dict) and each.get("path"):
            scores = each.get("scores")
            found.append(
                {
                    "path": str(each["path"]),
                    "step": each.get("step"),
                    "epoch": each.get("epoch"),
                    "time": each.get("time"),
                    "is_removed": bool(each.get("removed")),
                    "scores": flat(scores) if isinstance(scores, dict) else {},
                }
            )
    return found


def _warnings(run: Run) -> list[str]:
    texts = []
    for each in _list(run.record.get("warnings"))[-MAX_WARNINGS:]:
        text = (
            each.get("text") or each.get("message") if isinstance(each, dict) else each
        )
        texts.append(str(text or each))
    return [*texts, *(f"Reading this run: {problem}" for problem in run.problems)]


def _failure(run: Run) -> dict[str, Any] | None:
    failure = run.failure
    ended = run.record.get("ended")
    if not failure and isinstance(ended, dict) and ended.get("traceback"):
        only = {"rank": 0, "kind": "failed", "trace": ended["traceback"]}
        failure = {"summary": ended.get("why"), "ranks": [only]}
    if not failure:
        return None
    ranks = [
        {
            "rank": rank.get("rank"),
            "kind": str(rank.get("kind", "")),
            "place": str(rank.get("place") or ""),
            "message": str(rank.get("message") or ""),
            "trace": str(rank.get("trace") or "")[-20_000:],
        }
        for rank in _list(failure.get("ranks"))[:16]
        if isinstance(rank, dict)
    ]
    return {"summary": str(failure.get("summary", "")), "ranks": ranks}


def _model_text(model: Any) -> str:
    """Return the model's parts as a table, if the record has them."""
    layers = _list(model.get("layers")) if isinstance(model, dict) else []
    rows = [
        (str(each.get("name")), str(each.get("type")), str(each.get("parameters")))
        for each in layers
        if isinstance(each, dict)
    ]
    if not rows:
        return ""
    rows.insert(0, ("name", "type", "parameters"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}"
        for name, kind, count in rows
    )


def _flat_or_text(value: Any) -> dict[str, Any]:
    if isinstance(value, (dict, list)):
        return flat(value)
    return {"": value}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names: numbers, booleans, texts and None."""
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found.update(flat(inner, f"{prefix}.{name}" if prefix else str(name)))
        return found
    if isinstance(value, (list, tuple)) and any(
        isinstance(each, dict) for each in value
    ):
        return flat({str(index): each for index, each in enumerate(value)}, prefix)
    if isinstance(value, (list, tuple)):
        return {prefix: ", ".join(map(str, value)) if value else "[]"}
    if isinstance(value, dict):
        return {prefix: "{}"}
    if isinstance(value, float) and not math.isfinite(value):
        return {prefix: str(value)}
    return {
        prefix: value
        if isinstance(value, (bool, int, float, type(None)))
        else str(value)
    }


def _list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
