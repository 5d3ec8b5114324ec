"""The sizes that a module's layers take and return, found by calling the module with its example input."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def record_sizes(
    module: nn.Module,
    layers: dict[str, nn.Module],
    example: Any,
) -> tuple[dict[str, tuple[Any, Any]], str]:
    """Call a module once, in evaluation mode and without gradients. Afterwards it is as it was.

    Args:
        module: to be called.
        layers: submodules, by name, whose sizes are wanted.
        example: what the module takes: a tensor, or a tuple or dict of arguments.

    Returns:
        What layers take and return, by name: shapes, as lists of ints, nested as the tensors are, with None for what is
        not a tensor. And why some are missing, or "".
    """
    if is_lazy(module):
        # A forward pass would initialise it now, with other random numbers than without a summary.
        reason = "as they depend on lazy parameters that the first batch initialises"
        return {}, f"Sizes are not shown, {reason}."
    sizes: dict[str, tuple[Any, Any]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            taken = (*args, *kwargs.values())
            inputs = taken[0] if len(taken) == 1 else taken
            sizes.setdefault(name, (_shape(inputs), _shape(output)))

        return record

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            # TorchScript takes no hooks.
            if not isinstance(layer, torch.jit.ScriptModule):
                hook = layer.register_forward_hook(recorder(name), with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(_unchanged(module))
        stack.enter_context(torch.no_grad())
        module.eval()
        example = _like_parameters(example, module)
        try:
            if isinstance(example, dict):
                module(**example)
            elif isinstance(example, list):
                module(*example)
            else:
                module(example)
        except Exception as error:
            # Whatever the module's forward raises: a table is not worth a run.
            failure = f"{type(error).__name__}: {error}"
            return (
                sizes,
                f"Sizes are incomplete: forward(example_input_array) raised {failure}",
            )
    return sizes, ""


def is_lazy(module: nn.Module) -> bool:
    """Whether parameters of a module get their shape with the first batch."""
    return any(isinstance(p, UninitializedParameter) for p in module.parameters())


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back training modes, buffers and random generators afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = [
        (layer, name, buffer, buffer.detach().clone())
        for layer in module.modules()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for device in {parameter.device for parameter in module.parameters()}:
            if device.type not in ("cpu", "meta"):
                kind = device.type
                index = device.index or 0
                stack.enter_context(torch.random.fork_rng([index], device_type=kind))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            for layer, training in modes:
                layer.training = training
            for layer, name, buffer, value in buffers:
                buffer.detach().copy_(value)
                # Where forward has put another tensor instead of changing this one.
                layer._buffers[name] = buffer


def _like_parameters(example: Any, module: nn.Module) -> Any:
    """The example on the module's device, its floats in the module's dtype."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)

    def convert(value: Any) -> Any:
        if first is None or not isinstance(value, Tensor):
            return value
        dtype = first.dtype if value.is_floating_point() else None
        return value.to(first.device, dtype)

    return _map(convert, example)


def _shape(value: Any) -> Any:
    def shape(value: Any) -> list[int] | None:
        return list(value.shape) if isinstance(value, Tensor) else None

    return _map(shape, value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all values in a nesting of dicts, lists and tuples; tuples become lists."""
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_map(function, item) for item in value]
    return function(value)
