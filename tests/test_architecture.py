"""Who may import whom, how long things may get, and what importing the framework may cost."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.import_graph import (
    FOLDERS,
    LEAVES,
    ROOT,
    arrows,
    folder_of,
    parse,
    room_of,
    runtime_imports,
    sources,
)

CONTRACTS = ("callbacks/base.py", "loggers/base.py", "strategies/base.py")

# The framework's rooms and files from top to bottom: each may import those below it.
ROOMS = (
    "command_line",
    "compat",
    "framework",
    "cli",
    "trainer",
    "report",
    "lifecycle",
    "loop",
    "engine",
    "export",
    "module",
    "metrics",
    "datamodule",
    "from_checkpoint",
    "optimization",
    "data",
    "hparams",
    "checkpoint",
    "errors",
    "subclasses",
    "arguments",
    "messages",
    "seed",
)

# At most so many lines.
CONTRACT_LINES = 200
# Fewer tokens than these; Lightning's pytorch/ and fabric/ have 221,000, counted in the same way.
ALL_TOKENS = 235_000
# Rooms that do not count towards it: other trainers' names, commands, and what shows a run, which a reader of the
# trainer needs not open.
FACES = ("compat", "command_line", "cli", "export", "report")
# At most so many tokens in a line with code; reference projects have 6.2 to 7.5.
TOKENS_A_LINE = 7.5
# At most so many lines in a function, without its docstring.
FUNCTION_LINES = 45
# At most so many forks in a function: if, for, while, except, and, or, comprehensions.
BRANCHES = 15
# At most so many attributes in a class, beside those that are named as its constructor's arguments.
ATTRIBUTES = 20
# At most so many attributes are set by a module on objects of classes of other modules.
FOREIGN_WRITES = 8
# At most so many files at the top of framework/.
FILES_AT_THE_TOP = 12

# Constructors that only take their many arguments are long without being hard to read.
TAKE_ARGUMENTS = {"ModelCheckpoint.__init__", "Trainer.__init__"}
# Attributes of nn.Module and of autograd's contexts, which classes of ours have, too.
TORCHS_NAMES = {"training", "_buffers"}
TORCHS_OBJECTS = {"torch", "ctx"}

# Importing the framework must not import these, unless `import torch` does so already.
HEAVY = (
    "deepspeed",
    "fsspec.implementations",
    "jsonargparse",
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


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@cache
def code_tokens(file: Path) -> list[tuple[int, str]]:
    """Tokens of code with their lines: without comments, docstrings and layout."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    found, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(
        io.StringIO(file.read_text(encoding="utf-8")).readline
    ):
        docstring = token.type == tokenize.STRING and before in (
            tokenize.INDENT,
            tokenize.NEWLINE,
            tokenize.NL,
        )
        if token.type not in layout and not docstring:
            found.append((token.start[0], token.string))
        before = token.type
    return found


def tokens_of(file: Path) -> int:
    """How many tokens of code; how they are spread over lines makes no difference."""
    return len(code_tokens(file))


def functions(
    node: ast.AST | None = None, outer: str = ""
) -> Iterator[tuple[str, ast.FunctionDef]]:
    """All functions and methods of the four folders, by `Class.method`."""
    if node is None:
        for file in sources().values():
            yield from functions(parse(file))
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield f"{outer}{child.name}", child
        is_scope = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        yield from functions(child, f"{outer}{child.name}." if is_scope else outer)


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    """All classes of the four folders, with their files."""
    for file in sources().values():
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ClassDef):
                yield file, node


def lines_of_code(function: ast.FunctionDef) -> int:
    """Lines of its body, without its docstring."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return 1 + (function.end_lineno or 0) - statements[0].lineno if statements else 0


def branches_of(function: ast.FunctionDef) -> int:
    """How often its way may fork; functions inside it count for themselves."""
    forks = (
        ast.If,
        ast.IfExp,
        ast.For,
        ast.While,
        ast.ExceptHandler,
        ast.comprehension,
        ast.match_case,
    )
    count, nodes = 0, list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        count += isinstance(node, forks)
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        nodes += ast.iter_child_nodes(node)
    return count


def is_own(node: ast.Attribute) -> bool:
    """Whether an attribute is one of the object or class whose method this is."""
    owner = node.value
    if isinstance(owner, ast.Name):
        return owner.id in ("self", "cls")
    return isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"


def attributes_of(kind: ast.ClassDef) -> set[str]:
    """The attributes that a class declares, or its methods set."""
    declared = {
        node.target.id
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    nodes = [
        node
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and is_own(node)
    ]
    return declared | {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


@cache
def files_of_names() -> dict[str, set[Path]]:
    """In which files a name is an attribute or method of a class."""
    found: dict[str, set[Path]] = {}
    for file, kind in classes():
        assigned = [
            target
            for node in kind.body
            if isinstance(node, ast.Assign)
            for target in node.targets
        ]
        names = {
            node.id
            for target in assigned
            for node in ast.walk(target)
            if isinstance(node, ast.Name)
        }
        names |= {node.name for node in kind.body if isinstance(node, ast.FunctionDef)}
        for name in names | attributes_of(kind):
            found.setdefault(name, set()).add(file)
    return found


def is_torchs(node: ast.Attribute) -> bool:
    """Whether an attribute is one of torch's objects, though a class of ours has one of this name."""
    root = node.value
    while isinstance(root, ast.Attribute):
        root = root.value
    is_object = isinstance(root, ast.Name) and root.id in TORCHS_OBJECTS
    return is_object or node.attr in TORCHS_NAMES


@cache
def settable_properties() -> set[str]:
    """Names of properties with a setter, which is a method like others."""
    return {
        name.removesuffix(".setter")
        for _, function in functions()
        for name in map(ast.unparse, function.decorator_list)
        if name.endswith(".setter")
    }


def foreign_attributes() -> Iterator[tuple[str, ast.Attribute]]:
    """What a module touches of objects whose classes are ours and stand in other modules, by `file.py: expression`."""
    for file in sources().values():
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Attribute) and not is_own(node):
                homes = files_of_names().get(node.attr, set())
                if homes and file not in homes and not is_torchs(node):
                    yield f"{file.relative_to(ROOT)}: {ast.unparse(node)}", node


def code_lines_of(file: Path) -> int:
    """Lines that hold a token of code."""
    return len({line for line, _ in code_tokens(file)})


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
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, (
        f"`{statement}` fails in a fresh interpreter:\n{run.stderr}"
    )
    return set(run.stdout.split())


def test_the_four_folders_have_code():
    empty = [
        folder for folder in FOLDERS if not (ROOT / folder / "__init__.py").is_file()
    ]
    assert not empty, (
        f"no __init__.py in {empty}: the other tests here would pass without looking at anything"
    )


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
    assert not found, (
        f"{folder}/ may import {sorted(forbidden)} under TYPE_CHECKING only:\n"
        + "\n".join(found)
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_own_modules_are_imported_relatively(folder: str):
    found = [
        f"{file.relative_to(ROOT)}:{imported.line} imports {imported.target}"
        for name, file in sources().items()
        if folder_of(name) == folder
        for imported in runtime_imports(file)
        if folder_of(imported.target) in (*FOLDERS, "") and not imported.relative
    ]
    assert not found, (
        "editors and type checkers resolve relative imports only:\n" + "\n".join(found)
    )


def test_no_import_cycles():
    graph: dict[str, set[str]] = {name: set() for name in sources()}
    for name, target, _ in arrows():
        graph[name].add(target)
    cycle = find_cycle(graph)
    assert cycle is None, "import cycle, deferred imports included: " + " -> ".join(
        cycle or []
    )


def test_arrows_go_down_only():
    known = {*ROOMS, *LEAVES}
    rooms = {room_of(name) for name in sources()}
    assert rooms == known, (
        f"name these in ROOMS, or take them out: {sorted(rooms ^ known)}"
    )
    floors = {room: floor for floor, room in enumerate((*ROOMS, *LEAVES))}
    up = [
        line
        for name, target, line in arrows()
        if floors[room_of(name)] > floors[room_of(target)]
    ]
    assert not up, (
        "imports go from a room to those below it, in the order of ROOMS:\n"
        + "\n".join(up)
    )


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_read_in_one_sitting(contract: str):
    lines = lines_of(ROOT / contract)
    assert lines <= CONTRACT_LINES, (
        f"{contract} has {lines} lines; a contract has at most {CONTRACT_LINES}"
    )


def test_all_of_it_stays_small():
    tokens = {
        folder: sum(
            tokens_of(file)
            for name, file in sources().items()
            if folder_of(name) == folder and room_of(name) not in FACES
        )
        for folder in FOLDERS
    }
    assert sum(tokens.values()) < ALL_TOKENS, (
        f"{sum(tokens.values())} tokens ({tokens}); the limit is {ALL_TOKENS}"
    )


def test_the_text_can_breathe():
    tokens = sum(tokens_of(file) for file in sources().values())
    lines = sum(code_lines_of(file) for file in sources().values())
    assert tokens / lines <= TOKENS_A_LINE, (
        f"{tokens} tokens in {lines} lines: one idea a statement"
    )


def test_functions_are_short():
    lengths = {name: lines_of_code(function) for name, function in functions()}
    long = {name for name, lines in lengths.items() if lines > FUNCTION_LINES}
    assert long <= TAKE_ARGUMENTS, (
        f"functions of over {FUNCTION_LINES} lines: {sorted(long - TAKE_ARGUMENTS)}"
    )


def test_functions_have_few_branches():
    forks = {name: branches_of(function) for name, function in functions()}
    branched = {name for name, count in forks.items() if count > BRANCHES}
    assert branched <= TAKE_ARGUMENTS, (
        f"functions of over {BRANCHES} branches: {sorted(branched - TAKE_ARGUMENTS)}"
    )


def arguments_of(kind: ast.ClassDef) -> set[str]:
    """The arguments of a class's constructor."""
    constructors = [
        node
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    return {
        argument.arg
        for constructor in constructors
        for argument in (*constructor.args.args, *constructor.args.kwonlyargs)
    }


def test_classes_have_few_attributes():
    counts = {
        kind.name: len(attributes_of(kind) - arguments_of(kind))
        for _, kind in classes()
    }
    large = {name: count for name, count in counts.items() if count > ATTRIBUTES}
    assert not large, f"classes of over {ATTRIBUTES} attributes: {large}"


def test_objects_set_their_own_attributes():
    written = {
        (name, node.attr)
        for name, node in foreign_attributes()
        if isinstance(node.ctx, ast.Store)
        and node.attr not in settable_properties()
        and not node.attr.startswith("__")
    }
    names = {attribute for _, attribute in written}
    assert len(names) <= FOREIGN_WRITES, (
        f"{len(names)} attributes are set from outside: {sorted(written)}"
    )


def test_what_is_private_is_read_at_home():
    read = {
        name
        for name, node in foreign_attributes()
        if node.attr.startswith("_") and not node.attr.startswith("__")
    }
    imported = {
        f"{file.relative_to(ROOT)}: import {alias.name}"
        for file in sources().values()
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }
    assert not read | imported, sorted(read | imported)


def test_the_top_of_the_framework_shows_its_plan():
    files = sorted(file.name for file in (ROOT / "framework").glob("*.py"))
    assert len(files) <= FILES_AT_THE_TOP, (
        f"{len(files)} files at the top of framework/: {files}"
    )


def test_importing_the_framework_imports_nothing_heavy():
    # With a star, as each name is imported when it is asked for.
    added = modules_after("from loopwright.framework import *")
    added -= modules_after("import torch")
    leaked = sorted(
        name
        for name in added
        if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))
    )
    assert not leaked, (
        f"importing what is in `loopwright.framework` also imports {leaked}; import them where they are used"
    )


def test_names_say_what_a_thing_is():
    files = [
        f"{name} ({file.name})"
        for name, file in sources().items()
        if "utils" in name.split(".")
    ]
    classes = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for name, file in sources().items()
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ClassDef)
        and any(vague in node.name for vague in VAGUE_CLASS_NAMES)
        # What other trainers call their classes is theirs to say.
        and room_of(name) not in FACES
    ]
    assert not files + classes, (
        f"nothing called utils, and no class called {VAGUE_CLASS_NAMES}: {files + classes}"
    )


def test_the_package_is_made_of_the_four_folders():
    package = ROOT / "src" / "loopwright"
    links = {
        file.name: os.readlink(file) for file in package.iterdir() if file.is_symlink()
    }
    assert links == {folder: f"../../{folder}" for folder in FOLDERS}
    assert (package / "py.typed").is_file(), (
        "without py.typed, type checkers ignore the annotations"
    )


def test_no_folder_of_a_clone_is_taken_for_the_package():
    """A program beside a clone called `loopwright`, or inside one, is to get what is installed."""
    for file in (ROOT / "__init__.py", ROOT / "loopwright"):
        assert not file.exists(), f"{file} would be imported instead of src/loopwright"


def test_every_package_is_shipped():
    folders = {file.parent for file in sources().values()}
    bare = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if not (folder / "__init__.py").is_file()
    ]
    assert not bare, f"setuptools leaves out folders without __init__.py: {bare}"
