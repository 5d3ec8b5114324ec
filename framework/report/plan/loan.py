"""A module on loan: with tensors that take no memory, and given back as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Convert = Callable[[Tensor], torch.dtype]


class Fakes:
    """Makes a tensor without memory for each real one, the same for the same one.

    To be called under a ``FakeTensorMode``.

    Args:
        device: where they seem to be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By the real one's id, which is kept, so that the id stays its own.
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the one for ``tensor``, of its type or of ``dtype``."""
        found = self._made.get(id(tensor))
        if found is not None:
            return found[1]
        made: Tensor = torch.empty_strided(
            tuple(tensor.shape),
            tensor.stride(),
            dtype=dtype or tensor.dtype,
            device=self._device,
        )
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad and tensor.is_leaf:
            made.requires_grad_()
        self._made[id(tensor)] = (tensor, made)
        return made


def convert(fakes: Fakes, value: Any) -> Any:
    """Return an attribute's value with fake tensors in the place of real ones; collections are copied."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Tensor):
        return fakes.of(value) if value.layout == torch.strided else value
    if type(value) in (list, set, tuple, deque):
        return type(value)(convert(fakes, item) for item in value)
    if type(value) is dict:
        return {key: convert(fakes, item) for key, item in value.items()}
    return value


@contextmanager
def kept(module: nn.Module) -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """On leaving, let all attributes of all of a module's modules be as they were; gives these attributes."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    tables = [
        (table, dict(table))
        for part, _ in before
        for table in vars(part).values()
        if isinstance(table, dict)
    ]
    try:
        yield before
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        for table, items in tables:
            table.clear()
            table.update(items)


@contextmanager
def on_loan(
    module: nn.Module, fakes: Fakes, dtype_of: Callable[[nn.Module, Tensor], Any]
) -> Iterator[None]:
    """Let a module have fake tensors, and collections of its own; on leaving, it is as it was.

    Args:
        module: the module.
        fakes: makes the tensors.
        dtype_of: the type of a parameter or buffer, from the module that has it; None for its own.

    Raises:
        ValueError: for parameters that have no shape yet.
    """
    torchs = set(vars(nn.Module()))
    with kept(module) as before:
        for part, _ in before:
            for name, parameter in vars(part)["_parameters"].items():
                if parameter is not None and is_lazy(parameter):
                    raise ValueError(
                        f"{type(part).__name__}.{name} has no shape before the first forward: call the module on a "
                        "batch before it is planned"
                    )
        for part, attributes in before:
            for kind in ("_parameters", "_buffers"):
                table = vars(part)[kind]
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = fakes.of(tensor, dtype_of(part, tensor))
            for name in attributes.keys() - torchs:
                vars(part)[name] = convert(fakes, attributes[name])
        yield
