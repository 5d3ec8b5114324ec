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
            type(child) is nn.Sequential and not _is_all_torch(child)
        ):
            compile_submodules(child, options)
        elif getattr(child, "_compiled_call_impl", None) is None:
            if _is_all_torch(child):
                child._compiled_call_impl = torch.compile(
                    _called_from_here(child._call_impl), **options
                )
            else:
                child.compile(**options)


def _is_all_torch(module: nn.Module) -> bool:
    """Whether a module consists of torch's own layers only."""
    return all(
        type(part).__module__.startswith("torch.nn.") for part in module.modules()
    )


def _called_from_here(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``call``, a method inside torch.nn: torch.compile skips such code unless code of elsewhere calls it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # A code object for each layer: torch recompiles one only so often, and all layers would share that number.
    return FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )
