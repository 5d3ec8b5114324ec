"""Lightning's functions about compiled modules."""

from __future__ import annotations

from typing import Any

import torch

from .core import LightningModule

__all__ = ["_maybe_unwrap_optimized", "from_compiled", "to_uncompiled"]


def from_compiled(model: Any) -> LightningModule:
    """The module inside of what ``torch.compile`` has returned; calls of it are compiled.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            f"`model` is required to be a `OptimizedModule`. Found a `{type(model).__name__}` instead."
        )
    module = model._orig_mod
    if not isinstance(module, LightningModule):
        raise ValueError(
            f"`model` is expected to be a compiled LightningModule. Found a `{type(module).__name__}` instead"
        )
    module.note_compiled_calls(model.dynamo_ctx(module.forward))
    return module


def to_uncompiled(model: Any) -> LightningModule:
    """A module whose calls are not compiled any more; the same object.

    Raises:
        ValueError: if it was not compiled.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = from_compiled(model)
    if not isinstance(model, LightningModule) or not model.calls_are_compiled:
        raise ValueError("`model` is required to be a compiled LightningModule")
    model.note_compiled_calls(None)
    return model


def _maybe_unwrap_optimized(model: Any) -> LightningModule:
    """The module, also of what ``torch.compile`` has returned.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        return from_compiled(model)
    if not isinstance(model, LightningModule):
        raise TypeError(
            f"`model` must be a `LightningModule` or `torch._dynamo.OptimizedModule`, got `{type(model).__qualname__}`"
        )
    return model
