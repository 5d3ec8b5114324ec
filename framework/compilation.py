"""Compiling a module's submodules in place, so that parameter names stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def compile_submodules(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile each child of ``module``; a container's children one by one, as it has no forward worth compiling.

    Args:
        module: the module; it is changed in place.
        options: arguments of ``torch.compile``.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS) and type(child) in _CONTAINERS:
            compile_submodules(child, options)
        elif getattr(child, "_compiled_call_impl", None) is None:
            child.compile(**options)
