"""Lines of code."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .contenders import installed, title
from .report import Table

# What of a distribution is comparable: of Lightning, the trainer and the layer below it.
FOLDERS = {
    "loopwright": ("framework", "callbacks", "loggers", "strategies"),
    "lightning": ("pytorch", "fabric"),
    "accelerate": (".",),
    "ignite": (".",),
}


def root(name: str) -> Path:
    """Where a contender's code is."""
    if name == "loopwright":
        return Path(__file__).resolve().parents[1]
    spec = find_spec(name)
    assert spec is not None, "it is installed"
    return Path(str(spec.origin)).parent


def lines(folder: Path) -> int:
    return sum(
        len(file.read_text(encoding="utf-8").splitlines())
        for file in folder.rglob("*.py")
    )


def compare() -> Table:
    rows, figures = [], {}
    for name in installed():
        if name == "raw":
            continue
        counts = {folder: lines(root(name) / folder) for folder in FOLDERS[name]}
        rows.append(
            [
                title(name),
                f"{sum(counts.values()):,}",
                ", ".join(counts) if len(counts) > 1 else "all",
            ]
        )
        figures[name] = counts
    return Table(
        "Lines of Python, comments and docstrings included",
        ("", "lines", "of"),
        rows,
        figures,
    )
