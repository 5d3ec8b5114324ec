"""Compiling a module's submodules in place, so that parameter names stay as they are; modules that come compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..messages import log


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


def uncompiled(model: Any) -> Any:
    """The module in what ``torch.compile(module)`` returned, compiled in place with the same options.

    As with ``module.compile()``, that means calls of the module itself, ``self(...)`` in its steps.

    Args:
        model: such a thing; anything else is returned as it is.
    """
    # What was compiled has imported it; where another thread is still importing it, the class is not there yet.
    optimized = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", None)
    if optimized is None or not isinstance(model, optimized):
        return model
    module: Any = model._orig_mod
    if type(module).forward is nn.Module.forward:
        log.warning(
            "torch.compile(module) compiles the module's forward, and %s has none, so nothing of it is compiled; "
            "Trainer(compile=True) compiles its parts",
            type(module).__name__,
        )
    elif getattr(module, "_compiled_call_impl", None) is None:
        module._compiled_call_impl = model.dynamo_ctx(module._call_impl)
    return module


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
