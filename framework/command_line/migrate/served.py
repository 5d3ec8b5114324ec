"""Which names of a program are not there under ``loopwright.lightning`` and ``loopwright.accelerate``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import libcst as cst

from ...compat.imports import UNSERVED
from .bindings import Program, dotted
from .findings import PATTERNS
from .names import Target, is_face, translate
from .rewrite import Note

# What the table of patterns tells, and what is renamed.
_TOLD = {pattern.text for pattern in PATTERNS} | {
    "accelerator.optimizer_step_was_skipped"
}


def find_missing(program: Program, target: Target) -> list[Note]:
    """Return what a program imports or uses and will not find, or will not be able to use.

    Args:
        program: as it was read.
        target: as of :func:`~.names.translate`.
    """
    notes: dict[str, Note] = {}
    for path, node in _names_of(program):
        name = path if is_face(path) else translate(path, target)
        problem = _problem(name)
        if problem:
            note = Note(program.line_of(node), problem)
            notes.setdefault(problem, note)
    if target == "native":
        finder = _FaceOnly(program)
        program.wrapper.module.visit(finder)
        return [*notes.values(), *finder.notes]
    return list(notes.values())


class _FaceOnly(cst.CSTVisitor):
    """Looks for what an Accelerator or Lightning's Trainer has, and ours has not; by the names that they mostly get."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.notes: list[Note] = []
        self._missing = {
            name: missing
            for family, name, missing in _missing_attributes()
            if family in program.families
        }

    def visit_Attribute(self, node: cst.Attribute) -> None:  # noqa: N802 # libcst's name
        owner = dotted(node.value).rpartition(".")[2]
        name = node.attr.value
        kind, names = self._missing.get(owner, ("", frozenset()))
        if name in names and f"{owner}.{name}" not in _TOLD:
            text = f"{owner}.{name}: {kind} has no {name}"
            self.notes.append(Note(self.program.line_of(node), text))


@cache
def _missing_attributes() -> list[tuple[str, str, tuple[str, frozenset[str]]]]:
    """Return, for each kind of object: whose it is, its usual name, and what ours has not."""
    from ...compat.accelerate.accelerator import Accelerator
    from ...compat.lightning.trainer import Trainer as LightningTrainer
    from ...engine.engine import Engine
    from ...trainer import Trainer

    return [
        (
            family,
            name,
            (f"the {ours.__name__}", frozenset(set(dir(face)) - set(dir(ours)))),
        )
        for family, name, face, ours in (
            ("accelerate", "accelerator", Accelerator, Engine),
            ("lightning", "trainer", LightningTrainer, Trainer),
        )
    ]


def _names_of(program: Program) -> Iterator[tuple[str, cst.CSTNode]]:
    """Yield the paths of names, each with a place where it stands."""
    for binding in program.bindings:
        yield binding.path, binding.statement
    for use in program.uses.values():
        yield use.path, use.node


@cache
def _problem(path: str) -> str:
    """Return what is wrong with a name of ours; an empty text if it is there and does something."""
    package, face, *rest = [*path.split("."), ""]
    root = f"{package}.{face}"
    if face not in ("lightning", "accelerate"):
        return ""
    found: Any = import_module(root)
    walked = root
    for part in filter(None, rest):
        # What a class has is its own business.
        if not isinstance(found, ModuleType):
            break
        before = walked
        walked = f"{walked}.{part}"
        found = _part(found, part, walked)
        if found is None:
            return f"{before} has no {part}"
    advice = getattr(found, UNSERVED, "")
    return f"{walked} can be imported, and does nothing: {advice}" if advice else ""


def _part(module: ModuleType, name: str, path: str) -> Any:
    """Return what a module has under a name, which may be a module itself; None if there is nothing."""
    try:
        return getattr(module, name)
    except AttributeError:
        pass
    try:
        return import_module(path)
    except ImportError:
        return None
