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
# Of a plot, in characters.
WIDTH = 46
HEIGHT = 8
# Characters of a panel beside its plot: the numbers of the axis and the frame.
FRAME = 14
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

    names = dict.fromkeys(name for run in runs for name in run.series)
    # Monitors come last.
    ordered = sorted(names, key=lambda name: name.startswith("monitor/"))
    plot_width = max(min(WIDTH, width - FRAME - 2), 10)
    panel_width = plot_width + FRAME
    panels = []
    for name in ordered:
        panel = Panel(
            _plot(runs, name, plot_width),
            title=Text(name),
            title_align="left",
            width=panel_width,
        )
        panels.append(panel)
    if not panels:
        panels = [Panel(Text("No metrics were logged"))]
    column_width = None
    if width > 2 * (WIDTH + FRAME):
        column_width = panel_width
    return Group(*_heads(runs), Columns(panels, width=column_width))


def _heads(runs: list[Run]) -> list[Any]:
    """Return what is said of each run: its name, how far it is, and of what it failed."""
    from rich.text import Text

    heads = []
    for index, run in enumerate(runs):
        status = status_of(run)
        head = Text(f"━━ {run.name}  ", style=_colour(index))
        head.append(f"{status['state']}, step {run.last_step:g}", style="bold default")
        heads.append(head)
        if run.failure:
            failure = Text(f"   {status['text']}", style="red")
            heads.append(failure)
    return heads


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _plot(runs: list[Run], name: str, width: int) -> Any:
    from rich.text import Text

    curves = []
    points = []
    for index, run in enumerate(runs):
        series = run.series.get(name)
        if not series:
            continue
        columns = curve(series, 0.0, width * 8)
        curves.append(columns)
        for x, y in zip(columns["x"], columns["y"], strict=True):
            if y is not None:
                points.append((x, y, index))
    if not points:
        return Text("no finite value")
    if len(points) == 1:
        x, y, _ = points[0]
        return Text(f"{y:.5g} at step {x:g}")
    xs, ys, _ = zip(*points, strict=True)
    left = min(xs)
    right = max(xs)
    low = min(ys)
    high = max(ys)
    cells = _cells(points, (left, right or 1), (low, high), width)
    picture = Text(no_wrap=True)
    for row in range(HEIGHT):
        label = ""
        if row == 0:
            label = f"{high:.3g}"
        elif row == HEIGHT - 1:
            label = f"{low:.3g}"
        picture.append(f"{label:>9} ", style="dim")
        for column in range(width):
            dots, index = cells.get((row, column), (0, 0))
            picture.append(chr(0x2800 + dots), style=_colour(index))
        picture.append("\n")
    first_step = f"{left:g}"
    last_step = f"{right:g}"
    gap = max(width - len(first_step) - len(last_step), 1) * " "
    picture.append(f"{'':10}{first_step}{gap}{last_step}\n", style="dim")
    lasts = ", ".join(map(_last, curves[:4]))
    picture.append(f"{'':10}last {lasts}")
    return picture


def _last(columns: dict[str, Any]) -> str:
    value = columns["last"][0]
    if isinstance(value, (int, float)):
        return f"{value:.5g}"
    return str(value)


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
        to_x = _place(x, x_range, width * 2)
        to_y = HEIGHT * 4 - 1 - _place(y, y_range, HEIGHT * 4)
        from_x, from_y = last.get(index, (to_x, to_y))
        last[index] = (to_x, to_y)
        # Dots from the last point to this one.
        distance_x = to_x - from_x
        distance_y = to_y - from_y
        count = max(abs(distance_x), abs(distance_y), 1)
        for part in range(count + 1):
            across = round(from_x + distance_x * part / count)
            down = round(from_y + distance_y * part / count)
            cell = (down // 4, across // 2)
            dots, _ = cells.get(cell, (0, index))
            cells[cell] = (dots | _DOTS[across % 2][down % 4], index)
    return cells


def _place(value: float, limits: tuple[float, float], count: int) -> int:
    low, high = limits
    if high <= low or not math.isfinite(high - low):
        return count // 2
    return min(int((value - low) / (high - low) * count), count - 1)
