"""YAML for manifests, as text that a person reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# What needs no quotes, and that YAML takes for nothing but a string.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/_.-]*")
_LINE = 88
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def as_yaml(value: Mapping[str, Any]) -> str:
    """Return a document; entries that are None are left out."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    """The lines of a mapping or a list, without indentation."""
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                lines += _entry(f"{_scalar(key)}:", item)
        return lines
    for item in value:
        first, *rest = _lines(item) if _is_nested(item) else [_scalar(item)]
        lines += [f"- {first}", *(f"  {line}" for line in rest)]
    return lines


def _entry(key: str, item: Any) -> list[str]:
    if not _is_nested(item):
        return [f"{key} {_scalar(item)}"]
    if isinstance(item, list) and not any(map(_is_nested, item)):
        # Of values alone: on one line, or one to a line between brackets.
        values = [_scalar(each) for each in item]
        if len(short := f"{key} [{', '.join(values)}]") <= _LINE:
            return [short]
        return [f"{key} [", *(f"  {value}," for value in values), "]"]
    return [key, *(f"  {line}" for line in _lines(item))]


def _is_nested(item: Any) -> bool:
    return isinstance(item, (Mapping, list)) and bool(item)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        # JSON's strings are YAML's, too, with whatever is not plain text escaped.
        return (
            value
            if is_plain
            else json.dumps(value, ensure_ascii=not value.isprintable())
        )
    return json.dumps(value)
