"""Compiling a module's submodules in place, so that parameter names stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn


def compile_submodules(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile each child of ``module``.

    A list or dict of modules has no forward to compile, and blocks in a row are cheaper to compile one by one, as
    equal ones share their code: so the children of these are compiled instead.

    Args:
        module: the module; it is changed in place.
        options: arguments of ``torch.compile``.
    """
    for child in module.children():
        if type(child) in (nn.ModuleList, nn.ModuleDict) or (
            type(child) is nn.Sequential and not _is_torchs(child)
        ):
            compile_submodules(child, options)
        elif getattr(child, "_compiled_call_impl", None) is None:
            if _is_torchs(child):
                child._compiled_call_impl = torch.compile(
                    _entry(child._call_impl), **options
                )
            else:
                child.compile(**options)


def _is_torchs(module: nn.Module) -> bool:
    """Whether it consists of torch's own layers only."""
    return all(
        type(part).__module__.startswith("torch.nn.") for part in module.modules()
    )


def _entry(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``call``: torch.compile skips code inside torch.nn unless it is called from elsewhere."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Code of its own: torch recompiles one piece of code only so often, and all layers would share this one.
    return FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )
