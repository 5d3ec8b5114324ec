"""Who may import whom, how long things may get, and what importing the framework may cost."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("framework", "callbacks", "loggers", "strategies")
LEAVES = ("callbacks", "loggers", "strategies")  # hold their own contract; framework/ composes them
CONTRACTS = ("callbacks/base.py", "loggers/base.py", "strategies/base.py")

CONTRACT_LINES = 200  # at most
ALL_TOKENS = 127_800  # fewer; Lightning's pytorch/ and fabric/ have 221,000, counted in the same way

# Importing the framework must not import these, unless `import torch` does so already.
HEAVY = (
    "deepspeed",
    "fsspec.implementations",
    "lightning",
    "matplotlib",
    "pandas",
    "rich",
    "sklearn",
    "tensorboard",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "torchmetrics",
)
VAGUE_CLASS_NAMES = ("Connector", "Manager", "Handler")


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
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(dotted: str) -> str:
    return dotted.partition(".")[0]


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def runtime_imports(file: Path) -> list[Import]:
    """What a module imports when it runs, in any place but under `if TYPE_CHECKING:`."""
    return [found for node, deferred in runtime_nodes(parse(file)) for found in imports_of(node, file, deferred)]


def runtime_nodes(node: ast.AST, deferred: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node` that can run, and whether they do so only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from runtime_nodes(ast.Module(child.orelse, []), deferred)
        else:
            yield child, deferred
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
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
            yield Import(name if name in sources() else base, node.lineno, deferred, relative=node.level > 0)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            target = absolute(name.value, file)
            yield Import(target, node.lineno, deferred, relative=name.value.startswith("."))


def absolute(name: str, file: Path) -> str:
    """The path below `loopwright` of a module that `file` calls `name`, with leading dots if relative."""
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return below_root(name)
    parents = file.relative_to(ROOT).parts[:-level]
    return ".".join((*parents, *filter(None, [name.lstrip(".")])))


def below_root(name: str) -> str:
    return "" if name == "loopwright" else name.removeprefix("loopwright.")


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def tokens_of(file: Path) -> int:
    """Tokens of code: without comments, docstrings and layout. How it is spread over lines makes no difference."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    count, before = 0, tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        docstring = token.type == tokenize.STRING and before in (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)
        count += token.type not in layout and not docstring
        before = token.type
    return count


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One cycle as a path that ends where it began, or None."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return None
        for successor in sorted(graph[node]):
            if cycle := visit(successor, [*path, node]):
                return cycle
        finished.add(node)
        return None

    return next(filter(None, (visit(node, []) for node in graph)), None)


def modules_after(statement: str) -> set[str]:
    """Names in `sys.modules` of a fresh interpreter after `statement`."""
    script = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"`{statement}` fails in a fresh interpreter:\n{run.stderr}"
    return set(run.stdout.split())


def test_the_four_folders_have_code():
    empty = [folder for folder in FOLDERS if not (ROOT / folder / "__init__.py").is_file()]
    assert not empty, f"no __init__.py in {empty}: the other tests here would pass without looking at anything"


@pytest.mark.parametrize("folder", LEAVES)
def test_leaves_import_no_sibling_folder(folder: str):
    forbidden = set(FOLDERS) - {folder}
    found = [
        f"{file.relative_to(ROOT)}:{imported.line} imports {imported.target}"
        for name, file in sources().items()
        if folder_of(name) == folder
        for imported in runtime_imports(file)
        if folder_of(imported.target) in forbidden
    ]
    assert not found, f"{folder}/ may import {sorted(forbidden)} under TYPE_CHECKING only:\n" + "\n".join(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_own_modules_are_imported_relatively(folder: str):
    found = [
        f"{file.relative_to(ROOT)}:{imported.line} imports {imported.target}"
        for name, file in sources().items()
        if folder_of(name) == folder
        for imported in runtime_imports(file)
        if folder_of(imported.target) in (*FOLDERS, "") and not imported.relative
    ]
    assert not found, "editors and type checkers resolve relative imports only:\n" + "\n".join(found)


def test_no_import_cycles():
    modules = sources()
    graph = {
        name: {imported.target for imported in runtime_imports(file) if not imported.deferred} & modules.keys()
        for name, file in modules.items()
    }
    cycle = find_cycle(graph)
    assert cycle is None, "import cycle: " + " -> ".join(cycle or [])


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_read_in_one_sitting(contract: str):
    lines = lines_of(ROOT / contract)
    assert lines <= CONTRACT_LINES, f"{contract} has {lines} lines; a contract has at most {CONTRACT_LINES}"


def test_all_of_it_stays_small():
    tokens = {folder: sum(tokens_of(f) for n, f in sources().items() if folder_of(n) == folder) for folder in FOLDERS}
    assert sum(tokens.values()) < ALL_TOKENS, f"{sum(tokens.values())} tokens ({tokens}); the limit is {ALL_TOKENS}"


def test_importing_the_framework_imports_nothing_heavy():
    added = modules_after("import loopwright.framework") - modules_after("import torch")
    leaked = sorted(name for name in added if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY)))
    assert not leaked, f"`import loopwright.framework` also imports {leaked}; import them where they are used"


def test_names_say_what_a_thing_is():
    files = [f"{name} ({file.name})" for name, file in sources().items() if "utils" in name.split(".")]
    classes = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in sources().values()
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ClassDef) and any(vague in node.name for vague in VAGUE_CLASS_NAMES)
    ]
    assert not files + classes, f"nothing called utils, and no class called {VAGUE_CLASS_NAMES}: {files + classes}"


def test_the_root_is_a_namespace_package():
    assert not (ROOT / "__init__.py").exists(), "the repository's root is the namespace package, without __init__.py"
    untyped = [folder for folder in FOLDERS if not (ROOT / folder / "py.typed").is_file()]
    assert not untyped, f"no py.typed in {untyped}: type checkers would ignore the annotations"


def test_every_package_is_shipped():
    packages = {".".join(("loopwright", *file.relative_to(ROOT).parent.parts)) for file in sources().values()}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert set(listed) == packages, "pyproject.toml lists the packages of a wheel: one for each folder with code"
