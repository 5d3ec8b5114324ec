"""Hyperparameters: the arguments that an object was constructed with."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import nn

from .checkpoint.class_paths import CLASS_PATH, INSTANTIATOR
from .checkpoint.configs import AttributeDict, fields_of, kind_of, portable

if TYPE_CHECKING:
    from typing_extensions import Self


class HyperparametersMixin:
    """Records the constructor's arguments, for :meth:`save_hyperparameters`."""

    logs_hparams = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Let the constructors record their arguments. A dataclass has its constructor only now."""
        _record_constructors(cls)
        new: Any = super().__new__
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the constructor's arguments in :attr:`hparams`, in checkpoints and in the loggers.

        Call it in ``__init__``, of the class or of a base class: what subclasses pass to their bases counts too, the
        outermost value of a name first. An argument that ``__init__`` has given another value
        counts with that. Arguments taken by ``**kwargs`` count one by one.

        Args:
            *args: names of arguments to keep (default: all); or one object to keep the fields of instead: any mapping,
                ``argparse.Namespace``, dataclass, attrs or pydantic object.
            ignore: names of arguments to leave out, and to forget if a base class has kept them.
            logger: whether loggers get them.

        Raises:
            ValueError: for a name that is no argument of the constructor.
            TypeError: for anything else than names or such an object.
        """
        chosen = self._chosen_hyperparameters(args)
        self._note_call(args[0] if len(args) == 1 else None)
        depth = len(self.__dict__.get("_constructor_calls") or ())
        ignored = self.__dict__.setdefault("_ignored_hparams", {})
        ignored[depth] = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.logs_hparams = logger
        self.hparams.update(chosen)
        for level, names in ignored.items():
            # A subclass, whose constructor runs around its base's, has the last word.
            if level <= depth:
                for name in names:
                    self.hparams.pop(name, None)
        modules = [
            name for name, value in self.hparams.items() if isinstance(value, nn.Module)
        ]
        if modules:
            warnings.warn(
                f"save_hyperparameters keeps {', '.join(map(repr, modules))}, which is a module: every checkpoint "
                f"would hold its weights a second time, as a pickled object; leave it out by ignore={modules!r}",
                stacklevel=2,
            )
        self.__dict__["_hparams_initial"] = _copy(self.hparams)

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters kept by :meth:`save_hyperparameters`."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of :attr:`hparams` as they were when kept."""
        return self.__dict__.get("_hparams_initial", AttributeDict())

    def _chosen_hyperparameters(self, args: tuple[Any, ...]) -> Mapping[str, Any]:
        """What ``save_hyperparameters(*args)`` keeps: an object's fields, or arguments of the constructor by name."""
        given = fields_of(args[0]) if len(args) == 1 else None
        if given is not None:
            return given
        if not all(isinstance(name, str) for name in args):
            raise TypeError(
                "save_hyperparameters takes names of arguments, or one dict or other mapping, Namespace, dataclass, "
                f"attrs or pydantic object; got {args!r}"
            )
        config = self.__dict__.get("_hparams_config", {})
        recorded = {**self._constructor_arguments(), **config}
        unknown = [name for name in args if name not in recorded]
        if unknown:
            raise ValueError(
                f"save_hyperparameters: {', '.join(unknown)} is no argument of {type(self).__name__}; "
                f"its arguments are: {', '.join(recorded) or 'none'}"
            )
        kept = (*args, INSTANTIATOR, CLASS_PATH)
        return {k: v for k, v in recorded.items() if not args or k in kept}

    def _note_call(self, kept: Any) -> None:
        """Note how to construct the object again: with which of its hyperparameters, or with all of them as one."""
        running = self.__dict__.get("_constructor_calls")
        if not running:
            return
        # All hyperparameters are fields of one argument, and not an argument each.
        is_object = kept is not None and not isinstance(kept, str)
        arguments = self._constructor_arguments(running[:1])
        kinds = {}
        whole = None
        for name, value in arguments.items():
            kind = kind_of(type(self), name, value)
            if kind:
                kinds[name] = kind
            if whole is None and is_object and value is kept:
                whole = [name, kind or type(kept).__name__]
        self.__dict__["_hparams_call"] = {
            "arguments": list(arguments),
            "whole": whole,
            "kinds": kinds,
        }

    @property
    def hparams_call(self) -> dict[str, Any] | None:
        """How to construct the object again, or None if :meth:`save_hyperparameters` was not called in ``__init__``.

        Its ``"arguments"`` are the names of the constructor's arguments, its ``"kinds"`` the classes of those that a
        checkpoint holds as plain dicts, and its ``"whole"`` the name and class of the one that holds all
        hyperparameters, or None.
        """
        return self.__dict__.get("_hparams_call")

    def portable_hparams(self) -> dict[str, Any]:
        """The hyperparameters for a checkpoint: what :attr:`hparams_call` tells how to make again, in plain dicts."""
        call = self.hparams_call
        if call is None:
            return dict(self.hparams)
        hparams = {}
        for name, value in self.hparams.items():
            is_config = call["whole"] or name in call["kinds"]
            hparams[name] = portable(value) if is_config else value
        return hparams

    def _constructor_arguments(self, running: Any = None) -> dict[str, Any]:
        """The arguments of the constructors that are running, by name, defaults included."""
        running = running or self.__dict__.get("_constructor_calls")
        if not running:
            raise RuntimeError(
                f"{type(self).__name__}: the constructor's arguments are known in __init__ only"
            )
        arguments: dict[str, Any] = {}
        for init, args, kwargs in reversed(running):
            signature = inspect.signature(init)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            # A constructor may have given an argument another value, such as an empty dict for None.
            changed = _locals_of(init, self)
            for name, value in list(bound.arguments.items())[1:]:
                value = changed.get(name, value)
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(value)
                elif kind is not inspect.Parameter.VAR_POSITIONAL:
                    arguments[name] = value
        return arguments

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle of the object needs neither the raw arguments nor the Trainer that runs it now; and compiled
        # code, which a module inside another may have, cannot be pickled.
        state = dict(self.__dict__)
        for name in ("_constructor_calls", "_trainer", "_compiled_call_impl"):
            state.pop(name, None)
        return state


def _locals_of(init: Any, instance: object) -> Mapping[str, Any]:
    """The local variables of a constructor that is running for an object; none if it runs no more."""
    code = getattr(inspect.unwrap(init), "__code__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            names = frame.f_code.co_varnames
            if names and frame.f_locals.get(names[0]) is instance:
                return frame.f_locals
        frame = frame.f_back
    return {}


def _record_constructors(cls: type[Any]) -> None:
    """Let constructors of ``cls`` record what they are called with; so no frame has to be guessed.

    These are the constructors of its bases that derive from this mixin, those of other bases that call
    ``save_hyperparameters``, and in any case the one that is called first.
    """
    for kind in cls.__mro__:
        init = vars(kind).get("__init__")
        code = getattr(inspect.unwrap(init), "__code__", None) if init else None
        saves = "save_hyperparameters" in getattr(code, "co_names", ())
        if saves or issubclass(kind, HyperparametersMixin):
            _record_calls(kind, init)
    _record_calls(cls, cls.__init__)


def _record_calls(kind: type[Any], init: Any) -> None:
    """Let the constructor of a class record what it is called with, if that is a function which does not yet do so."""
    if not inspect.isfunction(init) or hasattr(init, "records_call"):
        return

    @functools.wraps(init)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        running = self.__dict__.setdefault("_constructor_calls", [])
        running.append((init, args, kwargs))
        try:
            init(self, *args, **kwargs)
        finally:
            running.pop()

    record.records_call = True  # type: ignore[attr-defined] # so that it is done once
    kind.__init__ = record


def _copy(hparams: AttributeDict) -> AttributeDict:
    """Copy hyperparameters, deeply where their values allow it."""
    copied = AttributeDict()
    for name, value in hparams.items():
        try:
            copied[name] = deepcopy(value)
        except Exception:
            # An open file, a lock: the hyperparameter itself still counts.
            copied[name] = value
    return copied
