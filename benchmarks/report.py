"""Tables of figures: the same text reads well in a terminal and as Markdown."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass
class Table:
    """One benchmark's outcome."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]]
    figures: dict[str, Any]  # what --json writes
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = [list(self.header), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = []
        for row in (cells[0], rule, *cells[1:]):
            first, *others = (
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            )
            lines.append("| " + " | ".join((row[0].ljust(len(first)), *others)) + " |")
        return "\n".join(
            (f"### {self.title}", "", *lines, *("\n" + note for note in self.notes))
        )


def verdict(
    value: float, target: float | None, unit: str = "", noisy: bool = False
) -> tuple[str, str]:
    """A target and whether it is met."""
    if target is None:
        return "", ""
    return (
        f"≤ {target:g}{unit}",
        "noisy" if noisy else "pass" if value <= target else "FAIL",
    )


def machine() -> str:
    """What the figures were taken on, in general words."""
    cpus = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    return (
        f"{date.today():%B %Y}; {platform.system()} {platform.machine()}, {cpus} CPU cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def has_marks(file: Path) -> bool:
    return END in file.read_text(encoding="utf-8").partition(BEGIN)[2]


def put_into(
    file: Path, about: Sequence[str], tables: Sequence[Table], keep: bool
) -> None:
    """Put tables between the two marks in a Markdown file.

    With `keep`, each replaces the one with its title, and the others stay. Where the introduction, which stays with
    them, does not hold for a new table, that says itself what it was measured on.
    """
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    intro, *sections = re.split(r"^(?=### )", old, flags=re.MULTILINE) if keep else [""]
    texts = {section.splitlines()[0]: section.strip() for section in sections}
    intro = intro.strip() or "\n\n".join(about)
    for table in tables:
        texts[f"### {table.title}"] = (
            str(table) if about[0] in intro else f"{table}\n\n{about[0]}"
        )
    text = "\n\n".join((intro, *texts.values()))
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
