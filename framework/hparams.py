"""Hyperparameters: the arguments that an object was constructed with."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Iterable
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

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 # as every class's
        # Python hands the constructor's arguments to __new__ too: recorded here, none is ever guessed from a frame.
        instance = super().__new__(cls)
        instance.__dict__["_constructor_call"] = (args, kwargs)
        return instance

    def save_hyperparameters(self, *args: Any, ignore: str | Iterable[str] | None = None, logger: bool = True) -> None:
        """Keep the constructor's arguments in :attr:`hparams`, in checkpoints and in the loggers.

        Call it in ``__init__``. Arguments taken by ``**kwargs`` count one by one.

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

    def _constructor_arguments(self) -> dict[str, Any]:
        """The arguments of the most derived constructor by name, defaults included."""
        call = self.__dict__.get("_constructor_call")
        if call is None:
            raise RuntimeError(f"{type(self).__name__}: the constructor's arguments are known in __init__ only")
        signature = inspect.signature(type(self).__init__)
        bound = signature.bind(self, *call[0], **call[1])
        bound.apply_defaults()
        arguments: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = value
        return arguments

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle of the object needs neither the raw arguments nor the Trainer that runs it now; and compiled
        # code, which a module inside another may have, cannot be pickled.
        left_out = ("_constructor_call", "_trainer", "_compiled_call_impl")
        return {k: v for k, v in self.__dict__.items() if k not in left_out}


def _copy(hparams: AttributeDict) -> AttributeDict:
    """Deep where the values allow it."""
    copied = AttributeDict()
    for name, value in hparams.items():
        try:
            copied[name] = deepcopy(value)
        except Exception:  # an open file, a lock: the hyperparameter itself still counts
            copied[name] = value
    return copied
