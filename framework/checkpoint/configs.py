"""Configurations, such as dataclasses and OmegaConf's, as plain dicts for a checkpoint, and made again from these."""

from __future__ import annotations

import dataclasses
import typing
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum, EnumMeta
from types import SimpleNamespace
from typing import Any

_NAMESPACES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Namespace, SimpleNamespace)
}


class AttributeDict(dict[str, Any]):
    """A dict whose keys can be read and set as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = ", ".join(map(str, self)) or "none"
            raise AttributeError(
                f"no hyperparameter {name!r}; there are: {known}"
            ) from None

    def __setattr__(
        self,
        name: str,
        value: Any,
    ) -> None:
        self[name] = value


def fields_of(config: Any) -> dict[str, Any] | None:
    """The fields of a mapping, namespace, dataclass, attrs or pydantic object by name; None if it is none of these."""
    if type(config).__name__ == "DictConfig" and isinstance(config, Mapping):
        return _readable_items(config)
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (Namespace, SimpleNamespace)):
        return dict(vars(config))
    if (names := _field_names(type(config))) is None:
        return None
    return {name: getattr(config, name) for name in names}


def _readable_items(config: Any) -> dict[str, Any]:
    """The items of an OmegaConf mapping; a value that cannot be read yet stays as it is written, such as ``???``."""
    from omegaconf import OmegaConf

    items: Any = OmegaConf.to_container(config, resolve=False)
    for name in items:
        # A value may be missing, or refer to one that is.
        with suppress(Exception):
            items[name] = config[name]
    return items


def _field_names(kind: type[Any]) -> dict[str, str | None] | None:
    """The fields of a class, each with the name of its constructor argument or None; None if it has no fields."""
    if dataclasses.is_dataclass(kind):
        return {
            field.name: field.name if field.init else None
            for field in dataclasses.fields(kind)
        }
    if hasattr(kind, "__attrs_attrs__"):
        return {
            field.name: field.alias if field.init else None
            for field in kind.__attrs_attrs__
        }
    if hasattr(kind, "__pydantic_validator__"):
        return {name: name for name in kind.model_fields}
    return None


def portable(value: Any) -> Any:
    """``value`` with all configurations in it as plain dicts, and sequences of other makes as lists."""
    if type(value) in (list, tuple):
        return type(value)(map(portable, value))
    if (fields := fields_of(value)) is not None:
        return {name: portable(item) for name, item in fields.items()}
    is_of_python = isinstance(
        value,
        (str, bytes, bytearray, range, memoryview, list, tuple),
    )
    if isinstance(value, Sequence) and not is_of_python:
        return list(map(portable, value))
    return value


def kind_of(
    owner: type[Any],
    argument: str,
    value: Any,
) -> str | None:
    """How :func:`rebuild` is to make ``value`` again, an argument of ``owner``'s constructor; None if it cannot.

    A class is named by the constructor's annotation only: a checkpoint alone must not say what code runs.
    """
    kind = type(value).__name__
    if kind in (*_NAMESPACES, "DictConfig", "ListConfig"):
        return kind
    # The object's own constructor or comparison may raise anything.
    with suppress(Exception):
        is_known = isinstance(value, Enum) or _field_names(type(value)) is not None
        if is_known and rebuild(owner, argument, kind, portable(value)) == value:
            return kind
    return None


def rebuild(
    owner: type[Any],
    argument: str,
    kind: str,
    value: Any,
) -> Any:
    """Make again what :func:`portable` has taken apart; of an unknown class, a dict with its keys as attributes.

    Args:
        owner: whose constructor takes it.
        argument: as which argument.
        kind: what :func:`kind_of` said.
        value: what :func:`portable` gave.
    """
    if kind in _NAMESPACES:
        return _NAMESPACES[kind](**_of_type(None, value))
    if kind in ("DictConfig", "ListConfig"):
        from omegaconf import OmegaConf

        return OmegaConf.create(value)
    hint = _hints(owner.__init__).get(argument)
    named = [
        hinted
        for hinted in (hint, *typing.get_args(hint))
        if getattr(hinted, "__name__", None) == kind
    ]
    return _of_type(next(iter(named), None), value)


def _hints(annotated: Any) -> dict[str, Any]:
    # A hint may use a name that is only there for type checkers.
    with suppress(Exception):
        return typing.get_type_hints(annotated)
    return dict(getattr(annotated, "__annotations__", {}))


def _of_type(hint: Any, value: Any) -> Any:
    """``value`` as what a type hint says, if that is an enum or a class with fields, or a union or container of one."""
    if type(value) in (list, tuple):
        item = next(iter(typing.get_args(hint)), None)
        return type(value)(_of_type(item, each) for each in value)
    kinds = (hint, *typing.get_args(hint))
    if not isinstance(value, dict):
        for kind in kinds:
            if (
                isinstance(kind, EnumMeta)
                and issubclass(kind, type(value))
                and type(value) not in kinds
            ):
                # The enum may have no such member any more.
                with suppress(ValueError):
                    return kind(value)
        return value
    for kind in kinds:
        names = _field_names(kind) if isinstance(kind, type) else None
        if names is not None and names.keys() == value.keys():
            return _with_fields(kind, names, value)
    return AttributeDict({name: _of_type(None, item) for name, item in value.items()})


def _with_fields(
    kind: type[Any], names: dict[str, str | None], values: dict[str, Any]
) -> Any:
    hints = _hints(kind)
    values = {name: _of_type(hints.get(name), value) for name, value in values.items()}
    made = kind(
        **{
            argument: values[name]
            for name, argument in names.items()
            if argument is not None
        }
    )
    if not hasattr(kind, "model_fields"):
        # Also what the constructor does not take, or would change once more.
        for name, value in values.items():
            object.__setattr__(made, name, value)
    return made
