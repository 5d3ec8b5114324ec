"""Checkpoints as packages read them themselves, by ``torch.load``."""

from __future__ import annotations

import ast
import csv
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...checkpoint.reader import unpickle_objects
from ...checkpoint.single_file import OURS, with_types
from .utilities import get_filesystem


def whole(content: Any) -> Any:
    """What ``torch.load`` has read, with objects of the user's in their places if it is a checkpoint of ours.

    In the file they are pickled apart, so that torch opens the rest without running code.
    """
    if not isinstance(content, dict) or not isinstance(content.get(OURS), dict):
        return content
    values = with_types(content, unpickle_objects(content[OURS]["objects"]))
    return {key: values.get(key, value) for key, value in content.items()}


def opening_objects(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load``, which with ``weights_only=False`` gives the objects of a checkpoint, too."""

    @functools.wraps(load)
    def load_whole(*args: Any, **kwargs: Any) -> Any:
        content = load(*args, **kwargs)
        return whole(content) if kwargs.get("weights_only") is False else content

    return load_whole


def open_objects_in_torch_load() -> None:
    """Let ``torch.load(weights_only=False)`` give packages the objects of checkpoints, as it does of Lightning's."""
    torch.load = opening_objects(torch.load)


# In JSON: a text, which is left alone, or a number that YAML writes otherwise.
_JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*"|(-?\d+)(e[+-]?\d+)|NaN|-?Infinity')
_YAML_NUMBERS = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}


def yaml_of(value: Any) -> str:
    """Plain values as YAML: JSON is nearly that, but readers of YAML take 1e-05 and NaN for texts."""

    def in_yaml(part: re.Match[str]) -> str:
        if part[2]:
            return f"{part[1]}.0{part[2]}"
        return _YAML_NUMBERS.get(part[0], part[0])

    return _JSON_PART.sub(in_yaml, json.dumps(value, indent=2)) + "\n"


def read_hparams(path: Any) -> dict[str, Any]:
    """The hyperparameters in a file that a logger has written.

    Args:
        path: of a YAML file (``.yaml``, ``.yml``), or of a CSV file with the columns ``key`` and ``value``.

    Raises:
        ValueError: for another suffix, or if the file holds something else.
        ModuleNotFoundError: for YAML without PyYAML.
    """
    suffix = os.path.splitext(str(path))[1]
    if suffix not in (".yaml", ".yml", ".csv"):
        raise ValueError(f"hparams_file is a .yaml, .yml or .csv; got {str(path)!r}")
    with get_filesystem(path).open(str(path), "r") as file:
        if suffix == ".csv":
            rows = csv.DictReader(file)
            return {row["key"]: as_literal(row["value"]) for row in rows}
        hparams = yaml_module().safe_load(file)
    if not isinstance(hparams, dict):
        raise ValueError(
            f"hparams_file {str(path)!r} holds no values by name; got {hparams!r}"
        )
    return hparams


def yaml_module() -> Any:
    """PyYAML.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "hparams_file needs PyYAML to read YAML: pip install pyyaml"
        ) from None
    return yaml


def as_literal(text: str) -> Any:
    """The Python value that a text writes, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextmanager
def as_path(checkpoint: Any) -> Iterator[Any]:
    """A path to a checkpoint, which may be an open file, in a ``with`` block."""
    if not hasattr(checkpoint, "read"):
        yield checkpoint
        return
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        shutil.copyfileobj(checkpoint, file)
        file.flush()
        yield file.name
