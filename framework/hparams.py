"""Hyperparameters: the arguments that an object was constructed with."""

from __future__ import annotations

import functools
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any


class AttributeDict(dict[str, Any]):
    """A dict whose keys can be read and set as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = ", ".join(map(str, self)) or "none"
            raise AttributeError(f"no hyperparameter {name!r}; there are: {known}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class HyperparametersMixin:
    """Records the constructor's arguments, for :meth:`save_hyperparameters`."""

    _log_hyperparams = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Each class's constructor notes what it is called with; so nothing is ever guessed from a frame.
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)

    def save_hyperparameters(self, *args: Any, ignore: str | Iterable[str] | None = None, logger: bool = True) -> None:
        """Keep the constructor's arguments in :attr:`hparams`, in checkpoints and in the loggers.

        Call it in ``__init__``, of the class or of a base class: what subclasses pass to their bases counts too, the
        outermost value of a name first. Arguments taken by ``**kwargs`` count one by one.

        Args:
            *args: names of arguments to keep (default: all); or one dict or ``argparse.Namespace`` to keep instead.
            ignore: names of arguments to leave out.
            logger: whether loggers get them.

        Raises:
            ValueError: for a name that is no argument of the constructor.
            TypeError: for anything else than names, a dict or a namespace.
        """
        if len(args) == 1 and isinstance(args[0], (dict, Namespace)):
            chosen = dict(args[0] if isinstance(args[0], dict) else vars(args[0]))
        elif all(isinstance(name, str) for name in args):
            recorded = self._constructor_arguments()
            if unknown := [name for name in args if name not in recorded]:
                raise ValueError(
                    f"save_hyperparameters: {', '.join(unknown)} is no argument of {type(self).__name__}; "
                    f"its arguments are: {', '.join(recorded) or 'none'}"
                )
            chosen = {name: recorded[name] for name in args} if args else recorded
        else:
            raise TypeError(f"save_hyperparameters takes names of arguments, or one dict or Namespace; got {args!r}")
        self._note_call(args[0] if len(args) == 1 else None)
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self._log_hyperparams = logger
        self.hparams.update({name: value for name, value in chosen.items() if name not in left_out})
        self.__dict__["_hparams_initial"] = _copy(self.hparams)

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters kept by :meth:`save_hyperparameters`."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of :attr:`hparams` as they were when kept."""
        return self.__dict__.get("_hparams_initial", AttributeDict())

    def _note_call(self, kept: Any) -> None:
        """Note how to construct the object again: with which of its hyperparameters, or with all of them as one."""
        if running := self.__dict__.get("_constructor_calls"):
            own = self._constructor_arguments(running[:1])
            whole = next(([n, type(v).__name__] for n, v in own.items() if v is kept and not isinstance(v, str)), None)
            self.__dict__["_hparams_call"] = {"arguments": list(own), "whole": whole}

    @property
    def hparams_call(self) -> dict[str, Any] | None:
        """How to construct the object again: names of its arguments, and the one that holds all hyperparameters."""
        return self.__dict__.get("_hparams_call")

    def _constructor_arguments(self, running: Any = None) -> dict[str, Any]:
        """The arguments of the constructors that are running, by name, defaults included."""
        running = running or self.__dict__.get("_constructor_calls")
        if not running:
            raise RuntimeError(f"{type(self).__name__}: the constructor's arguments are known in __init__ only")
        arguments: dict[str, Any] = {}
        for init, args, kwargs in reversed(running):
            signature = inspect.signature(init)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            for name, value in list(bound.arguments.items())[1:]:
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(value)
                elif kind is not inspect.Parameter.VAR_POSITIONAL:
                    arguments[name] = value
        return arguments

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle of the object needs neither the raw arguments nor the Trainer that runs it now; and compiled
        # code, which a module inside another may have, cannot be pickled.
        left_out = ("_constructor_calls", "_trainer", "_compiled_call_impl")
        return {k: v for k, v in self.__dict__.items() if k not in left_out}


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        running = self.__dict__.setdefault("_constructor_calls", [])
        running.append((init, args, kwargs))
        try:
            init(self, *args, **kwargs)
        finally:
            running.pop()

    return record


def _copy(hparams: AttributeDict) -> AttributeDict:
    """Deep where the values allow it."""
    copied = AttributeDict()
    for name, value in hparams.items():
        try:
            copied[name] = deepcopy(value)
        except Exception:  # an open file, a lock: the hyperparameter itself still counts
            copied[name] = value
    return copied
