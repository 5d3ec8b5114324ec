"""Answering imports of ``accelerate`` with the modules of ``loopwright.accelerate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ...messages import configure, log
from ..imports import require_not_imported

_THEIRS = "accelerate"
_OURS = "loopwright.accelerate"


class _Aliases(MetaPathFinder, Loader):
    """Gives modules of ours, the same objects, under the names of accelerate's."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find the module of ours; None for a path that has none here."""
        package, dot, rest = fullname.partition(".")
        if package != _THEIRS:
            return None
        found = find_spec(f"{_OURS}{dot}{rest}")
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        spec = ModuleSpec(fullname, self, origin=found.origin, is_package=is_package)
        spec.loader_state = found.name
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module of ours."""
        module = import_module(spec.loader_state)
        # Python puts the other spec in its place, and then calls exec_module.
        spec.loader_state = module, module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Let the module keep its own spec; it has been run when it was imported."""
        assert module.__spec__ is not None
        state: Any = module.__spec__.loader_state
        module.__spec__ = state[1]


def names_of_others(module: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds what other modules of ours have.

    Accelerate's modules import from each other, and programs take a name from whichever has it.

    Args:
        module: the module's name.
    """

    def getattr_of_module(name: str) -> Any:
        if not name.startswith("__"):
            for place in (f"{_OURS}.utils", _OURS):
                found = vars(import_module(place)).get(name)
                if found is not None:
                    return found
            # `is_…_available` and names that programs seldom import.
            with suppress(AttributeError):
                return getattr(import_module(f"{_OURS}.utils"), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module


def is_installed() -> bool:
    """Whether imports of accelerate are answered already."""
    return any(isinstance(finder, _Aliases) for finder in sys.meta_path)


def install(quiet: bool = False) -> None:
    """Let ``import accelerate``, and imports from it, give :mod:`loopwright.accelerate`, from now on.

    So do those of packages that nobody may edit. It says so once.

    Args:
        quiet: do not say so.

    Raises:
        RuntimeError: if accelerate itself has been imported already.
    """
    if is_installed():
        return
    require_not_imported([_THEIRS], f"{_OURS}.install()")
    sys.meta_path.insert(0, _Aliases())
    if not quiet and os.environ.get("RANK", "0") == "0":
        configure()
        log.info("Imports of %s are answered by %s from now on", _THEIRS, _OURS)
