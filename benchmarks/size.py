"""How much code there is to read, in tokens: how code is spread over lines makes no difference to them."""

from __future__ import annotations

import tokenize
from collections.abc import Iterable
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
# Rooms of ours that a reader of the trainer needs not open: other trainers' names, commands, and what shows a run.
FACES = ("compat", "command_line", "cli", "report")
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
# After these, a string that stands alone is a docstring.
BEFORE_DOCSTRINGS = (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)


def root(name: str) -> Path:
    """Where a contender's code is."""
    if name == "loopwright":
        return Path(__file__).resolve().parents[1]
    spec = find_spec(name)
    assert spec is not None, "it is installed"
    return Path(str(spec.origin)).parent


def count(files: Iterable[Path]) -> tuple[int, int]:
    """Tokens without comments and docstrings, and lines that have some."""
    tokens = 0
    lines = 0
    for file in files:
        before = tokenize.NEWLINE
        occupied = set()
        with tokenize.open(file) as text:
            for token in tokenize.generate_tokens(text.readline):
                is_docstring = (
                    token.type == tokenize.STRING and before in BEFORE_DOCSTRINGS
                )
                if token.type not in LAYOUT and not is_docstring:
                    tokens += 1
                    occupied.add(token.start[0])
                before = token.type
        lines += len(occupied)
    return tokens, lines


def compare() -> Table:
    rows = []
    figures = {}

    def add(name: str, files: list[Path], of: str) -> None:
        tokens, lines = count(files)
        figures[f"{name}: {of}"] = {"tokens": tokens, "lines": lines}
        rows.append([name, f"{tokens:,}", f"{tokens / lines:.1f}", of])

    for name in installed():
        if name not in FOLDERS:
            continue
        files = [
            file
            for folder in FOLDERS[name]
            for file in sorted((root(name) / folder).rglob("*.py"))
        ]
        of = ", ".join(FOLDERS[name]) if len(FOLDERS[name]) > 1 else "all"
        add(title(name), files, of)
        if name == "loopwright":
            trainer = [file for file in files if not {*file.parts} & {*FACES}]
            add(title(name), trainer, f"the same without {', '.join(FACES)}")
    return Table(
        "Tokens of code, without comments and docstrings",
        ("", "tokens", "in a line", "of"),
        rows,
        figures,
    )
