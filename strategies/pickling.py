"""Pickling for other processes and later runs: classes and functions by name, by value where no name leads to them.

By name, what arrives is an instance of the very class, and ``kind is Kind.SMALL`` holds. cloudpickle sends what belongs
to ``__main__`` by value, so that each process, and each run, gets a class of its own. That is right for what has no
name, such as a lambda, or a notebook's class in the processes that were started for it.
"""

from __future__ import annotations

import io
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import cloudpickle


class Pickler(cloudpickle.Pickler):
    """cloudpickle's pickler, which goes by value only for what no name leads to."""

    def reducer_override(self, obj: Any) -> Any:
        """Decide how an object is pickled."""
        if isinstance(obj, (type, FunctionType)) and _has_name(obj):
            # Pickle itself then writes the name.
            return NotImplemented
        return super().reducer_override(obj)


def _has_name(obj: Any) -> bool:
    """Whether its module and qualified name lead to this very object."""
    named: Any = sys.modules.get(obj.__module__)
    for name in obj.__qualname__.split("."):
        named = getattr(named, name, None)
    return named is obj


def dumps(value: Any) -> bytes:
    """Pickle ``value``."""
    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def script_name() -> str:
    """The name under which another program would import this one's ``__main__``; empty if there is none."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return spec.name
    return Path(getattr(main, "__file__", None) or "").stem


class Unpickler(pickle.Unpickler):
    """Finds the classes of a script that is imported now and was ``__main__`` when they were pickled, or the reverse.

    Args:
        file: to read from.
        script: its :func:`script_name`.
    """

    def __init__(self, file: Any, script: str) -> None:
        super().__init__(file)
        self.script = script

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function of that name."""
        here = script_name()
        module_now = module
        # Only what is imported already counts: to import the script would run it.
        if module == "__main__" and self.script != here and self.script in sys.modules:
            module_now = self.script
        elif module == here and module not in sys.modules:
            module_now = "__main__"
        if module_now != module:
            with suppress(AttributeError):
                return super().find_class(module_now, name)
        return super().find_class(module, name)


def loads(content: bytes, script: str) -> Any:
    """Unpickle what :func:`dumps` gave in a program called ``script``."""
    return Unpickler(io.BytesIO(content), script).load()
