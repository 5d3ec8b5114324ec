"""A callback made of functions."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from .base import Callback

_HOOKS = tuple(
    name
    for name in vars(Callback)
    if name.startswith("on_") or name in ("setup", "teardown")
)


class LambdaCallback(Callback):
    """Call functions at moments of a run, without a class of your own.

    Args:
        **hooks: functions by the name of a :class:`Callback` hook, each taking that hook's arguments, as in
            ``LambdaCallback(on_train_start=lambda trainer, pl_module: print("go"))``.

    Raises:
        TypeError: if a name is no hook, or a value is no function.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            if name not in _HOOKS:
                close = get_close_matches(
                    name,
                    _HOOKS,
                    n=1,
                    cutoff=0.0,
                )
                raise TypeError(
                    f"LambdaCallback knows no hook {name!r}; the nearest is {close[0]!r}"
                )
            if not callable(function):
                raise TypeError(
                    f"LambdaCallback({name}=...) must be a function; got {function!r}"
                )
            setattr(self, name, function)
