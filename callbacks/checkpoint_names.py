"""How checkpoints are called: templates such as ``{epoch}-{val_loss:.2f}``, filled with what was logged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # {name} or {name:format}


def fill(template: str, values: Mapping[str, Any], with_names: bool, equals: str = "=") -> str:
    """Replace each ``{name:format}`` by the value of that name, 0 if there is none.

    Args:
        template: names may hold dots and slashes; the format is Python's.
        values: numbers, or tensors without dimensions.
        with_names: put ``name=`` before each value.
        equals: what stands between a name and its value.

    Raises:
        ValueError: if a value does not accept its format.
    """

    def replace(field: re.Match[str]) -> str:
        name, spec = field[1], field[2] or ""
        value = values.get(name, 0)
        try:
            text = format(value, spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"filename {template!r}: {name!r} is {value!r}, which cannot be formatted as {spec!r}"
            ) from error
        return f"{name}{equals}{text}" if with_names else text

    return _FIELD.sub(replace, template)
