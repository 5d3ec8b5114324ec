"""Docstrings of public functions tell their arguments, and the errors that they raise."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

import loopwright

# What is not explained yet. Nothing is added here; take out what has been written.
WITHOUT_ARGUMENTS: set[str] = {
    "Strategy.load_model_state",
    "Strategy.load_optimizer_state",
}
WITHOUT_ERRORS: set[str] = set()


class Documented(NamedTuple):
    """A public function, and the docstring that is to explain it; a constructor's is that of its class."""

    function: Any
    docstring: str


def functions_of(kind: type) -> Iterator[Documented]:
    """The constructor and the public methods that a class of ours defines and no base class of it explains."""
    for owner in kind.__mro__:
        if not owner.__module__.startswith("loopwright"):
            continue
        for name, item in vars(owner).items():
            is_new = not any(hasattr(base, name) for base in owner.__bases__)
            if name == "__init__" and owner is kind:
                docstring = owner.__doc__
            elif is_new and not name.startswith("_"):
                docstring = item.__doc__
            else:
                continue
            function = function_behind(item)
            if isinstance(function, FunctionType):
                yield Documented(function, docstring or "")


def function_behind(item: Any) -> Any:
    """What a class method, a property or a decorated function runs."""
    if isinstance(item, (classmethod, staticmethod)):
        item = item.__func__
    if isinstance(item, property):
        item = item.fget
    return inspect.unwrap(item) if callable(item) else item


def public_functions() -> dict[str, Documented]:
    """All public functions and methods by name."""
    found: dict[str, Documented] = {}
    for name in loopwright.__all__:
        item: Any = getattr(loopwright, name)
        if isinstance(item, FunctionType):
            found[name] = Documented(item, item.__doc__ or "")
        elif isinstance(item, type):
            for documented in functions_of(item):
                found[documented.function.__qualname__] = documented
    return found


def is_hook(function: FunctionType) -> bool:
    """Whether it is called at some moment of a run; what hooks get is explained once, in their class's docstring."""
    name = function.__name__
    return (
        name.startswith("on_")
        or name.endswith("_step")
        or name in ("setup", "teardown")
    )


def arguments_of(function: FunctionType) -> list[str]:
    """The arguments that have a name of their own, besides the object."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def explains_arguments(documented: Documented) -> bool:
    """Whether a function of two arguments or more has a line for each, or says where to see them.

    Of one argument, the first sentence tells.
    """
    arguments = arguments_of(documented.function)
    if len(arguments) < 2 or is_hook(documented.function):
        return True
    if "see :meth:" in documented.docstring:
        return True
    _, *sections = re.split(
        r"^ *(?:Args|Attributes):\n", documented.docstring, flags=re.M
    )
    listed = "".join(sections)
    return all(
        re.search(rf"^ *[\w, *]*\b{name}\b[\w, *]*:", listed, re.M)
        for name in arguments
    )


def raises(function: FunctionType) -> bool:
    """Whether it raises something itself, other than that a subclass has to define it."""
    try:
        source = inspect.getsource(function)
    except OSError:  # a dataclass has written it
        return False
    raised = [
        ast.unparse(node.exc)
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.Raise) and node.exc is not None
    ]
    return any("NotImplementedError" not in error for error in raised)


def test_arguments_are_explained():
    missing = {
        name
        for name, documented in public_functions().items()
        if not explains_arguments(documented)
    }
    assert missing <= WITHOUT_ARGUMENTS, (
        f"these have two arguments or more, and no line for each under `Args:`: {sorted(missing - WITHOUT_ARGUMENTS)}"
    )


def test_errors_are_told():
    missing = {
        name
        for name, documented in public_functions().items()
        if raises(documented.function) and "Raises:" not in documented.docstring
    }
    assert missing <= WITHOUT_ERRORS, (
        f"these raise errors and have no `Raises:`: {sorted(missing - WITHOUT_ERRORS)}"
    )
