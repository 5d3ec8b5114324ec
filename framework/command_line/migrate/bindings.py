"""Which names of a program come from Lightning or Accelerate, and where they are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
from libcst.metadata import (
    ImportAssignment,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    ScopeProvider,
)

from .names import family_of, reason_not_served


@dataclass(frozen=True, eq=False)
class Binding:
    """A name that an import statement has made.

    Attributes:
        statement: the statement.
        alias: its part that makes the name.
        path: what the name stands for, as a dotted path.
        local: the name.
        is_plain: ``import a.b``, which makes the name a, and lets a.b be written.
    """

    statement: cst.Import | cst.ImportFrom
    alias: cst.ImportAlias
    path: str
    local: str
    is_plain: bool


@dataclass(frozen=True, eq=False)
class Use:
    """A place where such a name is used.

    Attributes:
        node: the longest expression of names and dots there.
        path: what it stands for.
        binding: where its first name comes from.
    """

    node: cst.BaseExpression
    path: str
    binding: Binding


@dataclass
class Program:
    """A program's syntax tree, with what it imports of the packages in question.

    Attributes:
        wrapper: the tree.
        bindings: names that it imports.
        uses: where they are used, by expression.
        families: whose names they are.
    """

    wrapper: MetadataWrapper
    bindings: list[Binding] = field(default_factory=list)
    uses: dict[cst.CSTNode, Use] = field(default_factory=dict)
    families: set[str] = field(default_factory=set)

    def line_of(self, node: cst.CSTNode) -> int:
        """Return the line in which an expression or a statement begins."""
        positions: Any = self.wrapper.resolve(PositionProvider)
        return positions[node].start.line


def read_program(source: bytes | str, families: Iterable[str]) -> Program:
    """Parse a program and find its names.

    Args:
        source: its text.
        families: ``"lightning"``, ``"accelerate"``: whose names to look for.

    Raises:
        libcst.ParserSyntaxError: if it is no Python.
    """
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    program = Program(wrapper)
    finder = _Imports(frozenset(families))
    wrapper.module.visit(finder)
    program.bindings = finder.bindings
    program.families = finder.families
    _find_uses(program)
    return program


def dotted(node: cst.CSTNode | None) -> str:
    """Return the text of an expression of names and dots; empty if it is none."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr.value}" if before else ""
    return ""


class _Imports(cst.CSTVisitor):
    """Collects the import statements in question."""

    def __init__(self, families: frozenset[str]) -> None:
        super().__init__()
        self.wanted = families
        self.bindings: list[Binding] = []
        self.families: set[str] = set()

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Look at statements only: a tree is large."""
        if isinstance(node, cst.BaseExpression):
            return False
        return bool(super().on_visit(node))

    def visit_Import(self, node: cst.Import) -> None:  # noqa: N802 # libcst's name
        for alias in node.names:
            path = dotted(alias.name)
            local = alias.evaluated_alias
            self._add(node, alias, path, local or path, is_plain=local is None)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:  # noqa: N802 # libcst's name
        module = dotted(node.module)
        if node.relative or family_of(module) not in self.wanted:
            return
        self.families.add(family_of(module))
        if isinstance(node.names, cst.ImportStar):
            return
        for alias in node.names:
            name = alias.evaluated_name
            local = alias.evaluated_alias or name
            self._add(node, alias, f"{module}.{name}", local, is_plain=False)

    def _add(
        self,
        statement: cst.Import | cst.ImportFrom,
        alias: cst.ImportAlias,
        path: str,
        local: str,
        is_plain: bool,
    ) -> None:
        family = family_of(path)
        if family not in self.wanted:
            return
        self.families.add(family)
        if not reason_not_served(path):
            binding = Binding(statement, alias, path, local, is_plain)
            self.bindings.append(binding)


def _find_uses(program: Program) -> None:
    """Follow each name from its import to where it is used, as Python's scopes have it."""
    scopes: Any = set(program.wrapper.resolve(ScopeProvider).values())
    parents: Any = program.wrapper.resolve(ParentNodeProvider)
    by_place: dict[Any, Binding] = {(b.statement, b.local): b for b in program.bindings}
    for binding in program.bindings:
        # `import a.b` makes the name a, so that a.c may be written after it.
        root = binding.local.partition(".")[0]
        by_place.setdefault((binding.statement, root), binding)
    for scope in scopes:
        for assignment in scope.assignments if scope else ():
            if not isinstance(assignment, ImportAssignment):
                continue
            binding = by_place.get((assignment.node, assignment.name))
            if binding is None:
                continue
            for access in assignment.references:
                node = _longest_chain(access.node, parents)
                if node is not None:
                    path = _path_of(node, binding)
                    program.uses[node] = Use(node, path, binding)


def _longest_chain(node: Any, parents: Any) -> Any:
    """Return the longest expression of names and dots that an access is part of; None if it stands in a string."""
    while isinstance(node, cst.Attribute):
        node = node.value
    parent = parents.get(node)
    if not isinstance(node, cst.Name) or parent is None:
        return None
    while isinstance(parent, cst.Attribute) and parent.value is node:
        node = parent
        parent = parents.get(parent)
    return node


def _path_of(node: Any, binding: Binding) -> str:
    written = dotted(node)
    if binding.is_plain:
        return written
    return binding.path + written[len(binding.local) :]
