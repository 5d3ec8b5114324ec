"""``loopwright migrate``: programs for Lightning and Accelerate, rewritten for Loopwright."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .files import Notebook, Part, find_files, is_config
from .names import FAMILIES

if TYPE_CHECKING:
    from .rewrite import Note

# A file without these words needs not be parsed.
_WORDS = re.compile(rb"\b(?:lightning|pytorch_lightning|lightning_fabric|accelerate)\b")


@dataclass
class Result:
    """What becomes of a file.

    Attributes:
        path: of the file.
        parts: its texts, before and after.
        notes: what is told, each with its place.
        notebook: the file, if it is one.
        encoding: of a program.
    """

    path: Path
    parts: list[Part] = field(default_factory=list)
    notes: list[tuple[str, Note]] = field(default_factory=list)
    notebook: Notebook | None = None
    encoding: str = "utf-8"

    @property
    def changes(self) -> bool:
        """Whether anything of it becomes another text."""
        return any(part.before != part.after for part in self.parts)

    def write(self) -> None:
        """Write the file anew."""
        if self.notebook is not None:
            self.notebook.write(self.parts)
            return
        (part,) = self.parts
        self.path.write_bytes(part.after.encode(self.encoding))


def main(arguments: list[str]) -> int:
    """Run ``loopwright migrate``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: 1 with ``--check`` if something would change, and else 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if find_spec("libcst") is None:
        parser.exit(
            2,
            "loopwright migrate: needs LibCST: pip install 'loopwright[migrate]'\n",
        )
    try:
        results = [_migrate(path, options) for path in find_files(options.paths)]
    except FileNotFoundError as error:
        parser.error(str(error))
    changed = [result for result in results if result.changes]
    for result in changed:
        if options.write:
            result.write()
            print(f"rewrote {result.path}")
        elif not options.check:
            _print_diff(result)
    _print_notes([note for result in results for note in result.notes])
    _print_summary(len(changed), options)
    return 1 if options.check and changed else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="loopwright migrate",
        description="Rewrite the imports and arguments of programs for Lightning or Accelerate. Without --write, "
        "nothing is changed: a diff is printed, and a list of what to look at, on standard error.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a program, a notebook, or a folder with such",
    )
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print no diff; the exit code is 1 if something would change",
    )
    parser.add_argument(
        "--from",
        dest="family",
        choices=("lightning", "accelerate", "auto"),
        default="auto",
        help="whose names to rewrite; auto, the default: of both",
    )
    parser.add_argument(
        "--to",
        dest="target",
        choices=("face", "native"),
        default="face",
        help="face, the default: the same names under loopwright.lightning and loopwright.accelerate; native: "
        "Loopwright's own (Module, DataModule, Engine), where there are such",
    )
    return parser


def _migrate(path: Path, options: Namespace) -> Result:
    """Return what becomes of a file; one that cannot be read is told of, and stays."""
    from libcst import ParserSyntaxError

    from .rewrite import Note

    try:
        content = path.read_bytes()
        if not _WORDS.search(content):
            return Result(path)
        if is_config(path):
            return _config(path, content, options)
        if path.suffix == ".ipynb":
            return _notebook(path, options)
        return _program(path, content, options)
    except ParserSyntaxError as error:
        note = Note(error.raw_line, "cannot be parsed as Python 3, and stays as it is")
        place = f"{path}:{note.line}"
        if path.suffix == ".ipynb":
            notebook = Notebook.read(path)
            place = notebook.place(notebook.program(), note.line)
        return Result(path, notes=[(place, note)])
    except (ValueError, OSError) as error:
        return Result(path, notes=[(str(path), Note(0, f"cannot be read: {error}"))])


def _config(path: Path, content: bytes, options: Namespace) -> Result:
    from .findings import notes_of_text

    notes = notes_of_text(content.decode(), options.target)
    return Result(path, notes=[(f"{path}:{note.line}", note) for note in notes])


def _program(path: Path, content: bytes, options: Namespace) -> Result:
    after, encoding, notes = _rewritten(content, options)
    part = Part(str(path), content.decode(encoding), after)
    places = [(f"{path}:{note.line}", note) for note in notes]
    return Result(path, [part], places, encoding=encoding)


def _notebook(path: Path, options: Namespace) -> Result:
    notebook = Notebook.read(path)
    program = notebook.program()
    after, _, notes = _rewritten(program, options)
    places = [(notebook.place(program, note.line), note) for note in notes]
    return Result(path, notebook.parts(after), places, notebook)


def _rewritten(source: bytes | str, options: Namespace) -> tuple[str, str, list[Note]]:
    """Return a program's new text, its encoding, and what is told of it, by line."""
    from .bindings import read_program
    from .findings import find_notes
    from .rewrite import rewrite
    from .served import find_missing

    families = set(FAMILIES.values())
    if options.family != "auto":
        families = {options.family}
    program = read_program(source, families)
    module, notes = rewrite(program, options.target)
    notes += find_notes(program, options.target)
    notes += find_missing(program, options.target)
    notes = sorted(set(notes))
    return module.code, module.encoding, notes


def _print_diff(result: Result) -> None:
    for part in result.parts:
        lines = difflib.unified_diff(
            part.before.splitlines(True),
            part.after.splitlines(True),
            part.label,
            part.label,
        )
        for line in lines:
            # A last line without a line break is one all the same.
            print(line.rstrip("\r\n"))


def _print_notes(notes: list[tuple[str, Note]]) -> None:
    if notes:
        print("\nTo look at:", file=sys.stderr)
    for place, note in notes:
        section = ""
        if note.section:
            section = f' (docs/migration.md, "{": ".join(note.section)}")'
        print(f"{place}: {note.text}{section}", file=sys.stderr)


def _print_summary(changed: int, options: Namespace) -> None:
    files = "1 file" if changed == 1 else f"{changed} files"
    if options.write:
        text = f"{files} rewritten"
    else:
        text = f"{files} would be rewritten"
        if changed and not options.check:
            text += "; --write does it"
    print(text, file=sys.stderr)
