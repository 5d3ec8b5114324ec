"""What a run has logged besides numbers, put into the page: images, sounds, texts, tables, histograms."""

from __future__ import annotations

import base64
import math
import os
from pathlib import Path
from typing import Any

from ..secrets import Secrets
from .run import Run

# Of all runs together, in bytes of files; what comes last is kept.
MAX_BYTES = 24_000_000
# Of one name in one run; evenly chosen steps, with the first and the last.
MAX_STEPS = 30
# Of a text, in characters, and of a table.
MAX_TEXT = 20_000
MAX_ROWS = 200
_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "audio/wav",
    b"OggS": "audio/ogg",
    b"ID3": "audio/mpeg",
}


def embedded(run: Run, budget: int) -> tuple[list[dict[str, Any]], int]:
    """Return a run's media as the page takes them.

    Args:
        run: with its media.
        budget: bytes of files that may be put into the page.

    Returns:
        One entry for each name and kind: ``name``, ``kind``, ``steps``, each a pair of a step and a list of what was
        logged at it, and ``left_out``, how many steps were not taken; and how many bytes were taken.
    """
    by_name: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for entry in run.media:
        key = (str(entry.get("name", "")), str(entry.get("kind", "")))
        step = entry.get("step") or 0
        by_name.setdefault(key, {}).setdefault(step, []).append(entry)
    shown = []
    taken = 0
    secrets = Secrets(os.environ)
    for (name, kind), by_step in by_name.items():
        wanted = _evenly(sorted(by_step), MAX_STEPS)
        steps = []
        for step in reversed(wanted):
            items = [_item(run, kind, entry, secrets) for entry in by_step[step]]
            size = sum(len(item.get("source", "")) for item in items)
            if taken + size > budget:
                break
            taken += size
            steps.append([step, items])
        left_out = len(by_step) - len(steps)
        shown.append(
            {"name": name, "kind": kind, "steps": steps[::-1], "left_out": left_out}
        )
    return shown, taken


def _evenly(steps: list[float], count: int) -> list[float]:
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _item(
    run: Run, kind: str, entry: dict[str, Any], secrets: Secrets
) -> dict[str, Any]:
    """Return one image, text and so on, without secrets; with an ``error`` if it cannot be shown."""
    caption = secrets.clean_value(entry.get("caption"))
    item: dict[str, Any] = {"caption": str(caption)} if caption else {}
    if entry.get("file") or entry.get("data"):
        return {**item, **_file_item(run, entry)}
    value = entry.get("value")
    if kind == "table" and isinstance(value, dict):
        rows = value.get("rows", [])
        columns = secrets.clean_value(list(map(str, value.get("columns", []))))
        first_rows = secrets.clean_value(rows[:MAX_ROWS])
        shown = [[_cell(cell) for cell in row] for row in first_rows]
        return {**item, "columns": columns, "rows": shown, "count": len(rows)}
    if kind == "histogram" and isinstance(value, dict):
        return {
            **item,
            "counts": [_finite(count) for count in value["counts"]],
            "edges": [_finite(edge) for edge in value["edges"]],
        }
    if isinstance(value, dict):
        value = value.get("text", value)
    text = str(secrets.clean_value(value))
    cut = (
        f"… and {len(text) - MAX_TEXT} more characters" if len(text) > MAX_TEXT else ""
    )
    return {**item, "text": text[:MAX_TEXT] + cut}


def _finite(value: Any) -> Any:
    """Return a number as it is, and None in the place of NaN and infinity, which JSON lacks."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return value if is_number else None


def _file_item(run: Run, entry: dict[str, Any]) -> dict[str, Any]:
    data = entry.get("data")
    if data is None:
        file = (run.folder / str(entry["file"])).resolve()
        # A record from elsewhere must not put other files of this machine into a page.
        if not file.is_relative_to(run.folder.resolve()):
            return {"error": f"{entry['file']} lies outside the run's folder"}
        try:
            data = file.read_bytes()
        except OSError:
            return {"error": f"{Path(str(entry['file'])).name} is missing"}
    for magic, name in _TYPES.items():
        if data.startswith(magic):
            text = base64.b64encode(data).decode("ascii")
            return {"source": f"data:{name};base64,{text}"}
    return {"error": "neither PNG, JPEG, GIF, WAV, Ogg nor MP3"}


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
