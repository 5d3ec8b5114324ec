"""Which hooks somebody overrides: looked up once per run, so that the others cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ..module import Module
from ..subclasses import (
    HOOKS_ELSEWHERE,
    check_hook_arguments,
    check_initialized,
    check_names,
    overrides,
)

if TYPE_CHECKING:
    from ..trainer import Trainer

# The contract is the list: a hook is a public method of Callback that is not for the callback's own use.
_NO_HOOKS = ("state_dict", "load_state_dict", "log", "log_dict")
HOOKS = tuple(
    name
    for name, value in vars(Callback).items()
    if callable(value) and not name.startswith("_") and name not in _NO_HOOKS
)

PHASES = ("observe", "decide", "persist")


class CallbackBus:
    """Has an attribute for each hook, by its name: the tuple of functions to call, in order.

    Callbacks that observe come first, in the user's order, then the module's hook, then the loop's own work
    (:meth:`insert`), then callbacks that decide, then those that persist.

    Args:
        trainer: first argument of each callback's hook.
        module: the second; its own hooks are called, too.
        callbacks: the callbacks, in the user's order.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> tuple[Callable[..., Any], ...]: ...

    def __init__(
        self, trainer: Trainer, module: Module, callbacks: Iterable[Callback]
    ) -> None:
        ordered = order_callbacks(callbacks)
        self._num_early: dict[str, int] = {}
        for name in HOOKS:
            early: list[Callable[..., Any]] = []
            late: list[Callable[..., Any]] = []
            for callback in ordered:
                if overrides(callback, name, Callback):
                    check_hook_arguments(callback, name, Callback)
                    hooks = early if callback.phase == "observe" else late
                    hooks.append(partial(getattr(callback, name), trainer, module))
            if hasattr(Module, name) and overrides(module, name, Module):
                check_hook_arguments(module, name, Module)
                early.append(getattr(module, name))
            self._num_early[name] = len(early)
            setattr(self, name, (*early, *late))

    def insert(self, name: str, function: Callable[..., Any]) -> None:
        """Call ``function`` with a hook: after observers and the module, before callbacks that decide or persist.

        So the loop computes what callbacks decide upon, and marks how far the run has come in what they save.
        """
        hooks: tuple[Callable[..., Any], ...] = getattr(self, name)
        position = self._num_early[name]
        self._num_early[name] += 1
        setattr(self, name, (*hooks[:position], function, *hooks[position:]))

    def put_first(self, name: str, function: Callable[..., Any]) -> None:
        """Call ``function`` with a hook, before all others."""
        self._num_early[name] += 1
        setattr(self, name, (function, *getattr(self, name)))

    def call(self, name: str, *args: Any) -> None:
        """Call all hooks of a name, where speed does not matter."""
        for hook in getattr(self, name):
            hook(*args)


def order_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sort by phase; the user's order stays within each."""
    return sorted(callbacks, key=lambda callback: PHASES.index(callback.phase))


def check_callback(callback: Any) -> None:
    """Refuse what is no callback, and hooks that look misspelt.

    Raises:
        TypeError: if it is no :class:`~loopwright.callbacks.Callback`, or its phase is not one.
        ValueError: if a method's name is nearly that of a hook, or another trainer's.
    """
    if not isinstance(callback, Callback):
        raise TypeError(f"callbacks must hold Callback objects; got {callback!r}")
    if callback.phase not in PHASES:
        raise TypeError(
            f"{type(callback).__name__}.phase must be one of {', '.join(PHASES)}; got {callback.phase!r}"
        )
    check_initialized(callback)
    check_names(callback, Callback, HOOKS, HOOKS_ELSEWHERE)
