"""Who imports whom in the four folders: for the tests of the architecture, and for its picture in the documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("framework", "callbacks", "loggers", "strategies")
# What holds its own contract; framework/ composes it.
LEAVES = ("callbacks", "loggers", "strategies")


class Import(NamedTuple):
    """One imported module or name, as a path below `loopwright`: `framework.trainer`, or `os.path` for a stranger."""

    target: str
    line: int
    deferred: bool  # inside a function: runs when it is called, not when its module is imported
    relative: bool


@cache
def sources() -> dict[str, Path]:
    """All modules of the four folders by dotted name; a package goes by its folder's."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return {dotted_name(file): file for file in files}


def dotted_name(file: Path) -> str:
    """`framework/trainer.py` is `framework.trainer`, `framework/__init__.py` is `framework`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def folder_of(dotted: str) -> str:
    return dotted.partition(".")[0]


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def runtime_imports(file: Path) -> list[Import]:
    """What a module imports when it runs, in any place but under `if TYPE_CHECKING:`."""
    return [
        found
        for node, deferred in runtime_nodes(parse(file))
        for found in imports_of(node, file, deferred)
    ]


def runtime_nodes(
    node: ast.AST, deferred: bool = False
) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node` that can run, and whether they do so only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            yield from runtime_nodes(ast.Module(child.orelse, []), deferred)
        else:
            yield child, deferred
            inside = isinstance(
                child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            )
            yield from runtime_nodes(child, deferred or inside)


def imports_of(node: ast.AST, file: Path, deferred: bool) -> Iterator[Import]:
    """What one node imports: `import a`, `from .b import c`, `import_module(".d", __package__)` with a literal name."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(below_root(alias.name), node.lineno, deferred, relative=False)
    elif isinstance(node, ast.ImportFrom):
        base = absolute("." * node.level + (node.module or ""), file)
        for alias in node.names:
            name = f"{base}.{alias.name}".lstrip(".")
            # `from .b import c` imports the module b.c if there is one, and else the name c from the module b.
            yield Import(
                name if name in sources() else base,
                node.lineno,
                deferred,
                relative=node.level > 0,
            )
    elif (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
        and node.args
    ):
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            target = absolute(name.value, file)
            yield Import(
                target, node.lineno, deferred, relative=name.value.startswith(".")
            )


def absolute(name: str, file: Path) -> str:
    """The path below `loopwright` of a module that `file` calls `name`, with leading dots if relative."""
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return below_root(name)
    parents = file.relative_to(ROOT).parts[:-level]
    return ".".join((*parents, *filter(None, [name.lstrip(".")])))


def below_root(name: str) -> str:
    return "" if name == "loopwright" else name.removeprefix("loopwright.")


def room_of(dotted: str) -> str:
    """The room of a module: its sub-package of the framework, else the module; of the leaves, the folder."""
    folder, _, rest = dotted.partition(".")
    if folder != "framework" or not rest:
        return folder
    return rest.partition(".")[0]


def arrows() -> Iterator[tuple[str, str, str]]:
    """Who imports whom when it runs, deferred imports included: two modules of ours, and the line."""
    for name, file in sources().items():
        for imported in runtime_imports(file):
            if imported.target in sources() and imported.target != name:
                yield (
                    name,
                    imported.target,
                    f"{file.relative_to(ROOT)}:{imported.line} imports {imported.target}",
                )
