"""The files of a project that may hold programs: which there are, and how they are read and written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Folders that hold other people's code, or none.
_SKIPPED = ("__pycache__", "node_modules", "site-packages")
_CONFIGS = (".yaml", ".yml")
# Lines of a notebook's cell that are not Python: commands of IPython and of the shell.
_MAGIC = re.compile(
    r"^(?P<indent>[ \t]*)(?P<magic>[%!?].*|[\w, ]+=[ \t]*[%!].*|[\w.]+\?{1,2}[ \t]*)$",
    re.MULTILINE,
)
_MARK = "pass  # loopwright-magic:"
_MARKED = re.compile(rf"{re.escape(_MARK)}(?P<magic>.*)$", re.MULTILINE)
_CELL = "# loopwright-cell:"
_CELLS = re.compile(rf"^{re.escape(_CELL)}(\d+)\n", re.MULTILINE)


def find_files(paths: Iterable[str]) -> Iterator[Path]:
    """Yield the programs, notebooks and configurations at some paths, each once and in order.

    Args:
        paths: files, and folders that are searched; hidden folders and virtual environments in them are left out.

    Raises:
        FileNotFoundError: if there is nothing at a path.
    """
    seen: set[Path] = set()
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {name}")
        for file in [path] if path.is_file() else _files_in(path):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def is_config(path: Path) -> bool:
    """Whether a file is a configuration rather than a program."""
    return path.suffix in _CONFIGS


def _files_in(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED
            and not name.startswith(".")
            and not Path(parent, name, "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            if name.endswith((".py", ".ipynb", *_CONFIGS)):
                yield Path(parent, name)


@dataclass
class Part:
    """A text of a file that is compared: all of a program, or a cell of a notebook.

    Attributes:
        label: the file, and the cell.
        before: the text.
        after: what it becomes.
    """

    label: str
    before: str
    after: str


@dataclass
class Notebook:
    """A notebook, whose cells are read as one program: what one imports, others use.

    Attributes:
        path: of the file.
        text: its content.
        content: the same, decoded.
    """

    path: Path
    text: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Notebook:
        """Read a file.

        Args:
            path: of the file.

        Raises:
            ValueError: if it is no notebook.
        """
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict) or "cells" not in content:
            raise ValueError("it holds no notebook of version 4")
        return cls(path, text, content)

    def program(self) -> str:
        """Return the code of all cells, with comments between them; what is not Python stands in comments."""
        cells = self.code().items()
        return "".join(f"{_CELL}{index}\n{_masked(code)}\n" for index, code in cells)

    def code(self) -> dict[int, str]:
        """Return the Python code of each cell, by its index."""
        found: dict[int, str] = {}
        for index, cell in enumerate(self.content["cells"]):
            code = "".join(cell.get("source", ""))
            # Such a cell is in another language, or is timed as a whole.
            if cell.get("cell_type") == "code" and not code.lstrip().startswith("%%"):
                found[index] = code
        return found

    def parts(self, program: str) -> list[Part]:
        """Return the cells, with what they are in a new program.

        Args:
            program: as :meth:`program` returns it, changed.
        """
        _, *pieces = _CELLS.split(program)
        after = {
            int(index): _unmasked(code).removesuffix("\n")
            for index, code in zip(pieces[::2], pieces[1::2], strict=True)
        }
        return [
            Part(f"{self.path}[cell {index}]", code, after[index])
            for index, code in self.code().items()
        ]

    def place(self, program: str, line: int) -> str:
        """Return in words where a line of the program stands: in which cell, and where there, from 1."""
        before = program.splitlines()[:line]
        starts = [n for n, text in enumerate(before, 1) if text.startswith(_CELL)]
        index = int(before[starts[-1] - 1].removeprefix(_CELL))
        return f"{self.path}[cell {index}]:{line - starts[-1]}"

    def write(self, parts: list[Part]) -> None:
        """Write the file with its new cells; all else stays as it is.

        Args:
            parts: as :meth:`parts` returns them.
        """
        for index, part in zip(self.code(), parts, strict=True):
            if part.after == part.before:
                continue
            cell = self.content["cells"][index]
            as_lines = isinstance(cell["source"], list)
            cell["source"] = part.after.splitlines(True) if as_lines else part.after
        indent = re.search(r"^( +|\t+)\S", self.text, re.MULTILINE)
        step: Any = indent[1] if indent else None
        end = "\n" if self.text.endswith("\n") else ""
        is_ascii = self.text.isascii()
        text = json.dumps(self.content, indent=step, ensure_ascii=is_ascii) + end
        self.path.write_text(text, encoding="utf-8")


def _masked(code: str) -> str:
    """Put what is not Python into comments."""
    return _MAGIC.sub(lambda line: f"{line['indent']}{_MARK}{line['magic']}", code)


def _unmasked(code: str) -> str:
    return _MARKED.sub(lambda line: line["magic"], code)
