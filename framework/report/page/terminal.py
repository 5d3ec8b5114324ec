"""The curves of runs in a terminal, drawn with dots of Braille."""

from __future__ import annotations

import math
import time
from typing import Any

from .document import read_runs
from .payload import status_of
from .run import Run
from .series import curve

# Dots of a character of Braille, by column and row, as bits above U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "white")
WIDTH, HEIGHT = 46, 8
REFRESH_SECONDS = 2.0


def show(paths: list[str], live: bool = False) -> int:
    """Draw runs in the terminal.

    Args:
        paths: see :func:`~.folders.find_runs`.
        live: draw again and again, until Ctrl-C.

    Returns:
        The exit code, 0.
    """
    from rich.console import Console

    console = Console()
    if not live:
        console.print(_picture(read_runs(paths), console.width))
        return 0
    from rich.live import Live

    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as area:
        try:
            while True:
                picture = _picture(read_runs(paths), console.width)
                area.update(picture, refresh=True)
                time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            return 0


def _picture(runs: list[Run], width: int) -> Any:
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    heads = []
    for index, run in enumerate(runs):
        status = status_of(run)
        head = Text(f"━━ {run.name}  ", style=COLOURS[index % len(COLOURS)])
        head.append(f"{status['state']}, step {run.last_step:g}", style="bold default")
        heads.append(head)
        if run.failure:
            heads.append(Text(f"   {status['text']}", style="red"))
    names = dict.fromkeys(name for run in runs for name in run.series)
    columns = max(1, (width - 1) // (WIDTH + 14))
    inner = max(min(WIDTH, width - 16), 10)
    ordered = sorted(names, key=lambda name: name.startswith("monitor/"))
    panels = [
        Panel(
            _plot(runs, name, inner),
            title=Text(name),
            title_align="left",
            width=inner + 14,
        )
        for name in ordered
    ]
    if not panels:
        panels = [Panel(Text("No metrics were logged"))]
    return Group(*heads, Columns(panels, width=inner + 14 if columns > 1 else None))


def _plot(runs: list[Run], name: str, width: int) -> Any:
    from rich.text import Text

    curves = [
        (index, curve(run.series[name], 0.0, width * 8))
        for index, run in enumerate(runs)
        if name in run.series and len(run.series[name])
    ]
    points = [
        (x, y, index)
        for index, columns in curves
        for x, y in zip(columns["x"], columns["y"], strict=True)
        if y is not None
    ]
    if not points:
        return Text("no finite value")
    if len(points) == 1:
        (x, y, _), *_ = points
        return Text(f"{y:.5g} at step {x:g}")
    xs, ys, _ = zip(*points, strict=True)
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    cells = _cells(points, (left, right or 1), (low, high), width)
    picture = Text(no_wrap=True)
    for row in range(HEIGHT):
        labels = {0: f"{high:.3g}", HEIGHT - 1: f"{low:.3g}"}
        picture.append(f"{labels.get(row, ''):>9} ", style="dim")
        for column in range(width):
            dots, index = cells.get((row, column), (0, 0))
            picture.append(chr(0x2800 + dots), style=COLOURS[index % len(COLOURS)])
        picture.append("\n")
    middle = width - len(f"{left:g}") - len(f"{right:g}")
    picture.append(f"{'':10}{left:g}{'':{max(middle, 1)}}{right:g}\n", style="dim")
    lasts = ", ".join(_last(columns) for _, columns in curves[:4])
    picture.append(f"{'':10}last {lasts}")
    return picture


def _last(columns: dict[str, Any]) -> str:
    value = columns["last"][0]
    return f"{value:.5g}" if isinstance(value, (int, float)) else str(value)


def _cells(
    points: list[tuple[float, float, int]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    width: int,
) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the dots of each character that has some, and which run set the last of them."""
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    last: dict[int, tuple[int, int]] = {}
    for x, y, index in points:
        to = (
            _place(x, x_range, width * 2),
            HEIGHT * 4 - 1 - _place(y, y_range, HEIGHT * 4),
        )
        begin = last.get(index, to)
        last[index] = to
        # Dots from the last point to this one.
        count = max(abs(to[0] - begin[0]), abs(to[1] - begin[1]), 1)
        for part in range(count + 1):
            across = round(begin[0] + (to[0] - begin[0]) * part / count)
            down = round(begin[1] + (to[1] - begin[1]) * part / count)
            cell = (down // 4, across // 2)
            dots, _ = cells.get(cell, (0, index))
            cells[cell] = (dots | _DOTS[across % 2][down % 4], index)
    return cells


def _place(value: float, limits: tuple[float, float], count: int) -> int:
    low, high = limits
    if high <= low or not math.isfinite(high - low):
        return count // 2
    return min(int((value - low) / (high - low) * count), count - 1)
