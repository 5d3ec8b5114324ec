"""Which hooks somebody overrides: looked up once per run, so that the others cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ..names import (
    HOOKS_ELSEWHERE,
    check_hook_arguments,
    check_initialized,
    check_names,
    overrides,
)

if TYPE_CHECKING:
    from ..module import Module
    from ..trainer import Trainer

# The contract is the list: a hook is a public method of Callback that is not about its own state.
HOOKS = tuple(
    name
    for name, value in vars(Callback).items()
    if callable(value)
    and not name.startswith("_")
    and name not in ("state_dict", "load_state_dict")
)

PHASES = ("observe", "decide", "persist")

# At these moments the loop has work to do after the observers and the module and before the other phases:
# it computes what they decide upon, and marks how far the run has come in what they save.
SPLIT = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end")


class CallbackBus:
    """For each hook name, an attribute: the tuple of what to call, in order.

    Callbacks that observe come first, in the user's order, then the module's hook, then callbacks that decide, then
    those that persist. For the names in :data:`SPLIT` the last two stand in ``<name>_late``.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> tuple[Callable[..., Any], ...]: ...

    def __init__(
        self, trainer: Trainer, module: Module, callbacks: Iterable[Callback]
    ) -> None:
        ordered = order_callbacks(callbacks)
        observers = [callback for callback in ordered if callback.phase == "observe"]
        late = ordered[len(observers) :]
        from ..module import (
            Module as ModuleBase,
        )  # which imports the Trainer's parts in turn

        for name in HOOKS:
            for callback in ordered:
                if overrides(callback, name, Callback):
                    check_hook_arguments(callback, name, Callback)
            first = [
                partial(getattr(c, name), trainer, module)
                for c in observers
                if overrides(c, name, Callback)
            ]
            if hasattr(ModuleBase, name) and overrides(module, name, ModuleBase):
                check_hook_arguments(module, name, ModuleBase)
                first.append(getattr(module, name))
            last = [
                partial(getattr(c, name), trainer, module)
                for c in late
                if overrides(c, name, Callback)
            ]
            if name in SPLIT:
                setattr(self, f"{name}_late", tuple(last))
                last = []
            setattr(self, name, tuple(first + last))


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
