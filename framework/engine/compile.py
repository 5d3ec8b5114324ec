"""What ``Trainer(compile=…)`` asks for; compiling submodules in place; modules that come compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..messages import log


def read_compilation(argument: Any) -> tuple[str | None, dict[str, Any]]:
    """Read the Trainer's argument ``compile``.

    Args:
        argument: True, ``"parts"``, ``"step"``, or a dict with arguments of ``torch.compile``, and what to compile
            under ``"scope"`` (default: ``"parts"``).

    Returns:
        What to compile: ``"parts"`` for the module's submodules, ``"step"`` for the whole training step, or None; and
        the arguments of ``torch.compile``.

    Raises:
        ValueError: for anything else.
    """
    scope = argument
    options: dict[str, Any] = {}
    if isinstance(argument, dict):
        options = dict(argument)
        scope = options.pop("scope", "parts")
    elif isinstance(argument, bool) or argument is None:
        scope = "parts" if argument else None
    if scope not in ("parts", "step", None):
        raise ValueError(
            'compile must be a bool, "parts", "step", or a dict of arguments of torch.compile, with one of these two '
            f'under "scope"; got {argument!r}'
        )
    return scope, options


def compile_submodules(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile the parts of ``module``: repeated blocks by themselves, as equal ones are compiled once.

    What has repeated blocks in it, at whatever depth, such as the layers of a language model in a list, is not compiled
    as a whole: its blocks are, and its other parts.

    Args:
        module: the module; it is changed in place.
        options: arguments of ``torch.compile``.
    """
    _compile_children(module, options, {})


def _compile_children(
    module: nn.Module, options: dict[str, Any], codes: dict[Any, CodeType]
) -> None:
    for child in module.children():
        if _has_blocks(child):
            _compile_children(child, options, codes)
        elif getattr(child, "_compiled_call_impl", None) is None:
            if _is_all_torch(child) or _has_hooks(child):
                call = _called_from_here(child, codes)
                child._compiled_call_impl = torch.compile(call, **options)
            else:
                child.compile(**options)


def _has_blocks(module: nn.Module) -> bool:
    """Whether a module is not to be compiled as one: a list has no forward, and blocks in it are compiled once."""
    if type(module) in (nn.ModuleList, nn.ModuleDict):
        return True
    if type(module) is nn.Sequential and not _is_all_torch(module):
        return True
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            # Layers of torch's without parts are too small to be worth a graph each.
            blocks = [block for block in part if block is not None]
            kinds = [
                type(block)
                for block in blocks
                if next(block.children(), None) is not None
            ]
            if len({*kinds}) < len(kinds):
                return True
    return False


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


def _has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module, or of one in it, call hooks."""
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        for part in module.modules()
    )


def _called_from_here(
    module: nn.Module, codes: dict[Any, CodeType]
) -> Callable[..., Any]:
    """Wrap a module inside torch.nn: torch.compile skips such code unless code of elsewhere calls it."""
    call = module._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # A code object for each kind of layer: torch recompiles one only so often, and all layers would share that number.
    # Equal layers share what is compiled for one of them.
    state = module.state_dict().items()
    kind = (
        str(module),
        *((name, getattr(value, "dtype", None)) for name, value in state),
    )
    code = run.__code__.replace()
    if not _has_hooks(module):
        # What is compiled without hooks would serve a layer that has some, as torch does not look for them.
        code = codes.setdefault(kind, code)
    return with_code(run, code)


def with_code(function: FunctionType, code: CodeType) -> FunctionType:
    """A function with another code object: torch keeps what it has compiled, and how often, by code object."""
    return FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )
