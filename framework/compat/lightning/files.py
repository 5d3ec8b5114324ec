"""Checkpoints as packages read them themselves, by ``torch.load``."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...checkpoint.reader import unpickle_objects
from ...checkpoint.single_file import OURS, with_types


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
