"""Rewrites a program's imports, and the names and arguments that follow from them; all else stays as it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import libcst as cst

from .bindings import Binding, Program, Use, dotted
from .keywords import METHODS, advice, convert
from .names import (
    Target,
    family_of,
    is_face,
    is_native,
    reason_not_served,
    translate,
)

# Settings of a loop that the Trainer has itself.
LOOP_SETTINGS = ("max_epochs", "min_epochs", "max_steps", "min_steps")
# Strings in which a class may be named: annotations and lists of exports.
_NAMING_STRING = re.compile(r"[\w\[\], .|]{1,80}")


class Note(NamedTuple):
    """Something that is told of a line.

    Attributes:
        line: its number.
        text: what is told.
        section: of docs/migration.md, by headings; empty for none.
    """

    line: int
    text: str
    section: tuple[str, ...] = ()


def rewrite(program: Program, target: Target) -> tuple[cst.Module, list[Note]]:
    """Rewrite a program.

    Args:
        program: as it was read.
        target: as of :func:`~.names.translate`.

    Returns:
        The new syntax tree, and what could not be rewritten.
    """
    plan = _Plan(program, target)
    rewriter = _Rewriter(program, plan)
    module = program.wrapper.module.visit(rewriter)
    assert isinstance(module, cst.Module)
    return module, plan.notes + rewriter.notes


class _Plan:
    """What becomes of each name: decided before anything is changed.

    Attributes:
        target: as of :func:`rewrite`.
        replaced: the new texts of expressions.
        added: modules that have to be imported in addition, by import statement.
        notes: what is told.
    """

    def __init__(self, program: Program, target: Target) -> None:
        self.target: Target = target
        self.program = program
        self.replaced: dict[cst.CSTNode, str] = {}
        self.added: dict[cst.CSTNode, list[str]] = {}
        self.notes: list[Note] = []
        self._locals = {
            binding: self.local_name(binding) for binding in program.bindings
        }
        for use in program.uses.values():
            if not is_face(use.path):
                self._plan_use(use)
        if target == "native":
            self._note_faces()

    def new_path(self, binding: Binding) -> str:
        """Return what a name stands for after the change."""
        return translate(binding.path, self.target)

    def local_name(self, binding: Binding) -> str:
        """Return the name that an import makes after the change."""
        if binding.is_plain or binding.alias.asname or is_face(binding.path):
            return binding.local
        name = self.new_path(binding).rpartition(".")[2]
        if name == binding.local or self._is_module(binding):
            return binding.local
        # The new name may be somebody else's in this program, or the old one stand in a string.
        is_free = name not in self._words.names
        if is_free and binding.local not in self._words.in_strings:
            return name
        return binding.local

    @cached_property
    def _words(self) -> _Words:
        words = _Words()
        self.program.wrapper.module.visit(words)
        return words

    def _note_faces(self) -> None:
        """Tell which names have none of Loopwright's own, each once."""
        paths: dict[str, cst.CSTNode] = {}
        for binding in self.program.bindings:
            paths.setdefault(binding.path, binding.statement)
        for use in self.program.uses.values():
            if is_native(use.binding.path):
                paths.setdefault(use.path, use.node)
        for path, node in paths.items():
            if not is_face(path) and not is_native(path):
                line = self.program.line_of(node)
                text = f"{path} has no name of Loopwright's own: {translate(path, 'face')} is used"
                self.notes.append(Note(line, text))

    def _is_module(self, binding: Binding) -> bool:
        return not binding.path.rpartition(".")[2][:1].isupper() and (
            self.target == "face" or not is_native(binding.path)
        )

    def _plan_use(self, use: Use) -> None:
        binding = use.binding
        path = translate(use.path, self.target)
        base = self.new_path(binding)
        local = base if binding.is_plain else self._locals[binding]
        rest = path[len(base) :]
        # Of a native package, not all names are there; the others' faces are imported beside it.
        is_below = path == base or path.startswith(f"{base}.")
        is_other = (
            self.target == "native"
            and is_native(binding.path)
            and not is_native(use.path)
        )
        if is_below and not is_other:
            text = local + rest
        else:
            text = path
            module = _module_of(path)
            modules = self.added.setdefault(binding.statement, [])
            # With a part of a package, the package is imported.
            is_there = binding.is_plain and base.startswith(f"{module}.")
            if module not in modules and not is_there:
                modules.append(module)
        if text != dotted(use.node):
            self.replaced[use.node] = text


def _module_of(path: str) -> str:
    """Return the module to import for a name: its path up to the first class, or all but the last part."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part[:1].isupper():
            return ".".join(parts[:index])
    return ".".join(parts[:-1])


class _Words(cst.CSTVisitor):
    """Collects the words that a program has, so that a new name is not one that is taken.

    Attributes:
        names: of whatever kind, but for what stands behind a dot.
        in_strings: those in strings that may name classes, such as annotations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.in_strings: set[str] = set()

    def visit_Attribute(self, node: cst.Attribute) -> bool:  # noqa: N802 # libcst's name
        node.value.visit(self)
        return False

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802 # libcst's name
        self.names.add(node.value)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:  # noqa: N802 # libcst's name
        text = node.evaluated_value
        if isinstance(text, str) and _NAMING_STRING.fullmatch(text):
            self.in_strings.update(re.findall(r"\w+", text))


class _Rewriter(cst.CSTTransformer):
    """Makes the changes that a plan has decided on."""

    def __init__(self, program: Program, plan: _Plan) -> None:
        super().__init__()
        self.program = program
        self.plan = plan
        self.notes: list[Note] = []
        # Import statements that became several, by the one that was there.
        self._split: dict[cst.CSTNode, list[cst.BaseSmallStatement]] = {}
        self._bindings = {binding.alias: binding for binding in program.bindings}

    # libcst calls these by the names of its nodes. -----------------------------------------------------------

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        text = self.plan.replaced.get(original_node)
        if text is None:
            return super().on_leave(original_node, updated_node)
        expression = cst.parse_expression(text)
        return expression.with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)

    def leave_Attribute(  # noqa: N802 # libcst's name
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        if self.plan.target == "face" or not self.program.families:
            return updated_node
        value = updated_node.value
        name = updated_node.attr.value
        if (
            name in LOOP_SETTINGS
            and isinstance(value, cst.Attribute)
            and value.attr.value == "fit_loop"
        ):
            return updated_node.with_changes(value=value.value)
        if name == "optimizer_step_was_skipped":
            return updated_node.with_changes(attr=cst.Name("step_was_skipped"))
        return updated_node

    def leave_Call(  # noqa: N802 # libcst's name
        self, original_node: cst.Call, updated_node: cst.Call
    ) -> cst.Call:
        callee = self._callee(original_node)
        if not callee:
            return updated_node
        args = self._converted(original_node, updated_node.args, callee)
        return updated_node.with_changes(args=args)

    def leave_Import(  # noqa: N802 # libcst's name
        self, original_node: cst.Import, updated_node: cst.Import
    ) -> cst.Import:
        names: list[cst.ImportAlias] = []
        for old, new in zip(original_node.names, updated_node.names, strict=True):
            binding = self._bindings.get(old)
            if binding is not None and not is_face(binding.path):
                new = new.with_changes(name=_name(self.plan.new_path(binding)))
            self._note_not_served(original_node, dotted(old.name))
            names.append(new)
        return updated_node.with_changes(names=names)

    def leave_ImportFrom(  # noqa: N802 # libcst's name
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.BaseSmallStatement:
        module = dotted(original_node.module)
        if original_node.relative or is_face(module):
            return updated_node
        if isinstance(original_node.names, cst.ImportStar):
            return self._with_star(original_node, updated_node, module)
        groups: dict[str, list[cst.ImportAlias]] = {}
        for alias in original_node.names:
            self._note_not_served(original_node, f"{module}.{alias.evaluated_name}")
            binding = self._bindings.get(alias)
            home = module
            if binding is not None:
                home, alias = self._moved_alias(binding)
            groups.setdefault(home, []).append(alias)
        if len(groups) == 1 and "" not in groups:
            # Commas, line breaks and comments stay.
            (home, aliases), *_ = groups.items()
            return updated_node.with_changes(module=_name(home), names=aliases)
        first, *others = [
            _import_from(original_node, home, aliases)
            for home, aliases in groups.items()
        ]
        self._split[original_node] = others
        return first

    def leave_SimpleStatementLine(  # noqa: N802 # libcst's name
        self,
        original_node: cst.SimpleStatementLine,
        updated_node: cst.SimpleStatementLine,
    ) -> Any:
        following: list[cst.BaseSmallStatement] = []
        for statement in original_node.body:
            following += self._split.get(statement, [])
            following += [
                cst.Import([cst.ImportAlias(_name(module))])
                for module in self.plan.added.get(statement, [])
            ]
        if not following:
            return updated_node
        lines = [cst.SimpleStatementLine([statement]) for statement in following]
        return cst.FlattenSentinel([updated_node, *lines])

    def leave_SimpleStatementSuite(  # noqa: N802 # libcst's name
        self,
        original_node: cst.SimpleStatementSuite,
        updated_node: cst.SimpleStatementSuite,
    ) -> cst.SimpleStatementSuite:
        for statement in original_node.body:
            if self._split.get(statement) or self.plan.added.get(statement):
                self._note(
                    statement, "write this import in lines of its own, and try again"
                )
                return original_node
        return updated_node

    # Parts of these. -----------------------------------------------------------------------------------------

    def _moved_alias(self, binding: Binding) -> tuple[str, cst.ImportAlias]:
        """Return from where a name is imported, and how."""
        home, _, name = self.plan.new_path(binding).rpartition(".")
        alias = binding.alias.with_changes(name=cst.Name(name))
        local = self.plan.local_name(binding)
        if alias.asname is None and local != name:
            alias = alias.with_changes(asname=cst.AsName(cst.Name(local)))
        return home, alias

    def _with_star(
        self, original: cst.ImportFrom, updated: cst.ImportFrom, module: str
    ) -> cst.ImportFrom:
        if not module or family_of(module) not in self.program.families:
            return updated
        self._note(
            original,
            f"from {module} import *: which names come from it cannot be seen; name them",
        )
        if reason_not_served(module):
            self._note_not_served(original, module)
            return updated
        # Only the face has all names of the original.
        return updated.with_changes(module=_name(translate(module, "face")))

    def _callee(self, call: cst.Call) -> str:
        """Return what is called, if its arguments may have other names here."""
        use = self.program.uses.get(call.func)
        if use is not None:
            return use.path.rpartition(".")[2]
        if "lightning" not in self.program.families:
            return ""
        name = call.func.attr.value if isinstance(call.func, cst.Attribute) else ""
        return name if name in METHODS else ""

    def _converted(
        self, call: cst.Call, args: Sequence[cst.Arg], callee: str
    ) -> list[cst.Arg]:
        """Return a call's arguments under their new names."""
        code = self.program.wrapper.module.code_for_node
        made: list[tuple[cst.Arg, dict[str, str] | None]] = []
        for arg in args:
            name = arg.keyword.value if arg.keyword else ""
            new = None
            if name:
                new = convert(callee, name, code(arg.value), self.plan.target)
                if new is None and (text := advice(callee, name, self.plan.target)):
                    self._note(call, f"{name}=: here that is {text}")
            made.append((arg, new))
        kept = {arg.keyword.value for arg, new in made if arg.keyword and new is None}
        result: list[cst.Arg] = []
        for arg, new in made:
            if new is None:
                result.append(arg)
                continue
            fresh = {name: text for name, text in new.items() if name not in kept}
            kept |= fresh.keys()
            result += [_argument(arg, name, text) for name, text in fresh.items()]
        return _closed(result, args)

    def _note_not_served(self, statement: cst.CSTNode, path: str) -> None:
        reason = reason_not_served(path)
        if reason and family_of(path) in self.program.families:
            self._note(statement, f"{path} stays as it is: {reason}")

    def _note(self, node: cst.CSTNode, text: str) -> None:
        self.notes.append(Note(self.program.line_of(node), text))


def _name(path: str) -> Any:
    """Return the expression for a dotted path."""
    return cst.parse_expression(path)


def _import_from(
    before: cst.ImportFrom, home: str, aliases: list[cst.ImportAlias]
) -> cst.BaseSmallStatement:
    """Return a statement that imports some names of another one.

    Args:
        before: the other one; what stands in brackets there does so again, with its line breaks and comments.
        home: from where they are imported; empty for a package itself, which is imported from nowhere.
        aliases: the names.
    """
    *inner, last = aliases
    if home and before.lpar is not None and before.rpar is not None:
        return _ended(before.with_changes(module=_name(home), names=aliases), before)
    names = [
        *(alias.with_changes(comma=_plain_comma()) for alias in inner),
        last.with_changes(comma=cst.MaybeSentinel.DEFAULT),
    ]
    return cst.ImportFrom(_name(home), names) if home else cst.Import(names)


def _ended(statement: cst.ImportFrom, before: cst.ImportFrom) -> cst.ImportFrom:
    """Let a statement end as another one, of whose names it has some; comments stay behind their names.

    Args:
        statement: has brackets.
        before: the other one.
    """
    assert not isinstance(statement.names, cst.ImportStar)
    assert not isinstance(before.names, cst.ImportStar)
    assert statement.rpar is not None
    *inner, last = statement.names
    comma = last.comma
    old_comma = before.names[-1].comma
    if not isinstance(comma, cst.Comma):
        return statement
    if isinstance(old_comma, cst.Comma):
        space = _with_comment(old_comma.whitespace_after, comma.whitespace_after)
        last = last.with_changes(comma=comma.with_changes(whitespace_after=space))
        return statement.with_changes(names=[*inner, last])
    space = _with_comment(statement.rpar.whitespace_before, comma.whitespace_after)
    return statement.with_changes(
        names=[*inner, last.with_changes(comma=cst.MaybeSentinel.DEFAULT)],
        rpar=statement.rpar.with_changes(whitespace_before=space),
    )


def _with_comment(
    space: cst.BaseParenthesizableWhitespace,
    other: cst.BaseParenthesizableWhitespace,
) -> cst.BaseParenthesizableWhitespace:
    """Return a line break with the comment of another one."""
    if not isinstance(other, cst.ParenthesizedWhitespace):
        return space
    if not isinstance(space, cst.ParenthesizedWhitespace):
        return other
    return space.with_changes(first_line=other.first_line)


def _argument(old: cst.Arg, name: str, text: str) -> cst.Arg:
    """Return an argument in the place of another one."""
    value = cst.parse_expression(text)
    if text == cst.Module([]).code_for_node(old.value):
        value = old.value
    return old.with_changes(keyword=cst.Name(name), value=value)


def _closed(args: list[cst.Arg], before: Sequence[cst.Arg]) -> list[cst.Arg]:
    """Give arguments the commas and line breaks between and behind them that the old ones had."""
    if not args or not before or list(before) == args:
        return args
    last = before[-1]
    closed: list[cst.Arg] = []
    for index, arg in enumerate(args):
        if index == len(args) - 1:
            arg = arg.with_changes(
                comma=last.comma, whitespace_after_arg=last.whitespace_after_arg
            )
        elif arg.comma is last.comma:
            # It stood last, and something follows it now.
            between = before[0].comma if len(before) > 1 else _plain_comma()
            arg = arg.with_changes(
                comma=between, whitespace_after_arg=cst.SimpleWhitespace("")
            )
        closed.append(arg)
    return closed


def _plain_comma() -> cst.Comma:
    return cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
