"""Puts runs into one HTML file that needs nothing else: styles, programs and values are inside."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from .folders import find_runs, names_of, read_run
from .payload import payload
from .run import Run

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uPlot.min.css", "page.css")
PROGRAMS = (
    "uPlot.iife.min.js",
    "format.js",
    "curves.js",
    "chart.js",
    "time.js",
    "tables.js",
    "media.js",
    "page.js",
)
FILE_NAME = "report.html"


def read_runs(paths: list[str]) -> list[Run]:
    """Read all runs that paths mean, see :func:`~.folders.find_runs`."""
    folders = find_runs(paths)
    names = names_of(folders)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def write_report(paths: list[str], output: str | os.PathLike[str] | None = None) -> str:
    """Write a page of runs.

    Args:
        paths: of runs, see :func:`~.folders.find_runs`.
        output: the file. By default ``report.html``, in the run's folder, or in the current one if there are several.

    Returns:
        The file's absolute path.
    """
    runs = read_runs(paths)
    if output is None:
        folder = runs[0].folder if len(runs) == 1 else Path.cwd()
        output = folder / FILE_NAME
    file = Path(output).expanduser().resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Somebody may be looking at the one before it.
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(document(runs), encoding="utf-8")
    unfinished.replace(file)
    return str(file)


def content_of(runs: list[Run]) -> dict[str, Any]:
    """Return what the page shows of runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return payload(runs, title)


def as_json(value: Any) -> str:
    """Return JSON that may stand inside a ``<script>`` element: no text in it can end that, or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Halves of surrogate pairs, which a file of UTF-8 cannot hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def document(runs: list[Run], live: bool = False) -> str:
    """Return the page.

    Args:
        runs: what it shows.
        live: the page asks the server that it comes from for newer values.
    """
    content = content_of(runs)
    program = _joined(PROGRAMS)
    digest = hashlib.sha256(program.encode("utf-8")).digest()
    # The browser runs this program alone, and asks nobody for anything, whatever is among the values.
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'sha256-{base64.b64encode(digest).decode('ascii')}'",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "media-src data:",
            "connect-src 'self'" if live else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "policy": escape(policy),
        "title": escape(content["title"]),
        "styles": _joined(STYLES),
        "data": as_json({**content, "live": live}),
        "program": program,
    }
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


@cache
def _joined(names: tuple[str, ...]) -> str:
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)
