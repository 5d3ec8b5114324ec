"""The states of optimizers with parameters by name, where torch numbers them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """An optimizer's parameters, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, group by group; one that the module lacks gets a name of its place."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [
            names.get(id(parameter), f"optimizer.group{g}.param{i}")
            for i, parameter in enumerate(group["params"])
        ]
        for g, group in enumerate(optimizer.param_groups)
    ]


def rename_optimizer_state(
    state: dict[str, Any], names: list[list[str]]
) -> dict[str, Any]:
    """Replace torch's parameter numbers by names."""
    flat = [name for group in names for name in group]
    return {
        **state,
        "state": {flat[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": n}
            for group, n in zip(state["param_groups"], names, strict=True)
        ],
    }


def number_optimizer_state(
    state: dict[str, Any], names: list[list[str]]
) -> dict[str, Any]:
    """The inverse of :func:`rename_optimizer_state`, for parameters that may stand in another order now.

    Raises:
        ValueError: if the groups hold other parameters than they did.
    """
    groups = state["param_groups"]
    if len(groups) != len(names):
        raise ValueError(
            f"the checkpoint's optimizer has {len(groups)} parameter groups, this one has {len(names)}; a callback "
            "that has added some adds them again in on_fit_start"
        )
    for index, (group, now) in enumerate(zip(groups, names, strict=True)):
        missing, new = (
            sorted(set(group["params"]) - set(now)),
            sorted(set(now) - set(group["params"])),
        )
        if missing or new:
            raise ValueError(
                f"parameter group {index} of the optimizer differs from the checkpoint's: "
                f"only in the checkpoint {missing}, only here {new}"
            )
    numbers = {
        name: number
        for number, name in enumerate(name for group in names for name in group)
    }
    return {
        **state,
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in now]}
            for group, now in zip(groups, names, strict=True)
        ],
    }
