"""Signatures of constructors here, for programs and command lines that read which arguments there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def also_takes(
    init: Callable[..., None],
    names: Mapping[str, Any] | None = None,
    types: Mapping[str, Any] | None = None,
    faces: Mapping[Any, Any] | None = None,
) -> Callable[[Any], Any]:
    """Give a constructor the signature of another one beside its own.

    Args:
        init: the other one.
        names: what annotations of it mean that are there for type checkers only.
        types: of arguments, in place of their annotations.
        faces: by class, what stands for it in annotations.
    """

    def decorate(own: Callable[..., None]) -> Callable[..., None]:
        parameters = dict(inspect.signature(init).parameters)
        for name, parameter in inspect.signature(own).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                parameters[name] = parameter
        # Evaluated, as a command line would look for their names in another module than theirs.
        hints = get_type_hints(init, localns=dict(names or {}))
        hints = {**hints, **get_type_hints(own), **(types or {})}
        own.__signature__ = inspect.Signature(
            [
                p.replace(annotation=_with_faces(hints.get(name, Any), faces or {}))
                for name, p in parameters.items()
            ]
        )
        return own

    return decorate


def faces_of(base: type, *modules: ModuleType) -> Any:
    """A class with one of Lightning's names, or any other: a user may give a name alone for the former.

    Args:
        base: of the classes.
        *modules: which have Lightning's names.
    """
    here = __name__.rpartition(".")[0]
    kinds = [getattr(module, name) for module in modules for name in module.__all__]
    faces = [
        kind
        for kind in kinds
        if isinstance(kind, type)
        and kind.__module__.startswith(here)
        and base in kind.__mro__
    ]
    return Union[(*faces, base)]


def _with_faces(hint: Any, faces: Mapping[Any, Any]) -> Any:
    """A type in which Lightning's classes stand before those that they derive from."""
    origin: Any = get_origin(hint)
    if origin is None:
        return faces.get(hint, hint)
    if origin is Callable:
        return hint
    parts = tuple(_with_faces(part, faces) for part in get_args(hint))
    return Union[parts] if origin in (Union, UnionType) else origin[parts]  # noqa: UP007
