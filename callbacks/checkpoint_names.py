"""The folders and the names of checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..framework import Trainer

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # {name} or {name:format}


def fill(
    template: str,
    values: Mapping[str, Any],
    with_names: bool,
    equals: str = "=",
) -> str:
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
        name = field[1]
        spec = field[2] or ""
        value = values.get(name, 0)
        try:
            text = format(value, spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"filename {template!r}: {name!r} is {value!r}, which cannot be formatted as {spec!r}"
            ) from error
        return f"{name}{equals}{text}" if with_names else text

    return _FIELD.sub(replace, template)


def absolute(path: str) -> str:
    """The absolute local path, links and ``~`` resolved, also for a ``file://`` URL; other URLs as they are."""
    path = re.sub("^(file|local)://", "", path)
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def default_dirpath(trainer: Trainer) -> str:
    """``checkpoints`` in the first logger's folder of this run, or in ``default_root_dir``."""
    if not trainer.loggers:
        return absolute(os.path.join(trainer.default_root_dir, "checkpoints"))
    logger = trainer.loggers[0]
    if logger.log_dir is not None:
        return absolute(os.path.join(logger.log_dir, "checkpoints"))
    version = logger.version
    if isinstance(version, int):
        version = f"version_{version}"
    parts = (
        logger.save_dir or trainer.default_root_dir,
        logger.name,
        version,
        "checkpoints",
    )
    return absolute(os.path.join(*(str(part) for part in parts if part)))
