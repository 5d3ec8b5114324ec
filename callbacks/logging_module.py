"""Through which module a callback logs: that of the run in which it takes part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..framework import Module
    from .base import Callback

# By a callback's id, as it may not be hashable; its run holds it as long as it stands here. An attribute would bring
# the module into copies and pickles of the callback.
_MODULES: dict[int, Module] = {}


def module_of(callback: Callback) -> Module:
    """The module that runs with a callback.

    Raises:
        RuntimeError: outside of runs.
    """
    module = _MODULES.get(id(callback))
    if module is None:
        raise RuntimeError(
            f"{type(callback).__name__} logs while a Trainer runs that has it among its callbacks, and no such Trainer "
            "runs: call log in its hooks"
        )
    return module


@contextmanager
def logging_through(module: Module, callbacks: Iterable[Callback]) -> Iterator[None]:
    """Let callbacks log through a module, for one run; then again through that of a run around it."""
    ids = {id(callback) for callback in callbacks}
    outer = {key: _MODULES[key] for key in ids if key in _MODULES}
    _MODULES.update(dict.fromkeys(ids, module))
    try:
        yield
    finally:
        for key in ids:
            del _MODULES[key]
        _MODULES.update(outer)
