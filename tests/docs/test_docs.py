"""The Python code in README.md and docs/*.md runs as it stands.

A file's blocks run in order and share their names, in an empty directory. A block that is not to be run begins with
```` ```python notest ````.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """The line before each block of Python that is to be run, and its code."""
    for block in FENCE.finditer(text):
        language, *options = block["info"].split() or [""]
        assert set(options) <= {"notest"}, f"unknown option in ```{block['info']}"
        if language == "python" and not options:
            yield text.count("\n", 0, block.start("body")), block["body"]


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if any(blocks(page.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(
    "page", pages_with_code(), ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch):
    # A module of its own, as classes that are to be pickled must be found in one.
    module = ModuleType(f"page_{page.stem.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Empty lines before it let a traceback show the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)


def test_blocks_are_found_with_their_lines():
    text = "a\n\n```python\nx = 1\n```\n```python notest\nno\n```\n```\nno\n```\n````python\ny = 2\n````\n"
    assert list(blocks(text)) == [(3, "x = 1\n"), (12, "y = 2\n")]
