"""The states of optimizers, in which parameters have names instead of torch's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

# What a checkpoint keeps: nested, with tensors, their shards and plain values.
State = dict[str, Any]


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """An optimizer's parameters, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of an optimizer's parameters, by group; one that the module lacks is named by its position."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    by_group = []
    for group_number, group in enumerate(optimizer.param_groups):
        position = f"optimizer.group{group_number}.param"
        params = enumerate(group["params"])
        by_group.append([names.get(id(param), f"{position}{i}") for i, param in params])
    return by_group


def named_optimizer_state(
    module: nn.Module, optimizer: Optimizer, state: State
) -> State:
    """Return an optimizer's ``state_dict()`` with names in the place of torch's parameter numbers."""
    names = parameter_names(module, optimizer)
    flat = [name for group in names for name in group]
    return {
        **state,
        "state": {flat[number]: value for number, value in state["state"].items()},
        "param_groups": with_params(state["param_groups"], names),
    }


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: State) -> None:
    """Load what :func:`named_optimizer_state` returned; parameters may stand in another order now.

    Raises:
        ValueError: if the groups hold other parameters than they did, or, for LBFGS, in another order.
    """
    names = parameter_names(module, optimizer)
    check_same_parameters(state["param_groups"], names)
    if isinstance(optimizer, LBFGS):
        _check_same_order(state["param_groups"], names)
    flat = [name for group in names for name in group]
    numbers = {name: number for number, name in enumerate(flat)}
    numbers_by_group = [[numbers[name] for name in group] for group in names]
    numbered = {
        **state,
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": with_params(state["param_groups"], numbers_by_group),
    }
    optimizer.load_state_dict(numbered)


def _check_same_order(saved_groups: list[State], names: list[list[str]]) -> None:
    """Refuse the state of an optimizer that puts all parameters into one vector, if they stand in another order now."""
    for group, now in zip(saved_groups, names, strict=True):
        if list(group["params"]) != now:
            raise ValueError(
                "the optimizer's state is of all parameters together, which stand in another order now: in the "
                f"checkpoint {list(group['params'])}, here {now}"
            )


def check_same_parameters(saved_groups: list[State], names: list[list[str]]) -> None:
    """Refuse the state of an optimizer with other parameters.

    Args:
        saved_groups: the saved ``param_groups``, with names.
        names: of the optimizer's parameters now, by group.

    Raises:
        ValueError: naming the parameters that are in one of them only.
    """
    if len(saved_groups) != len(names):
        raise ValueError(
            f"the checkpoint's optimizer has {len(saved_groups)} parameter groups, this one has {len(names)}; a "
            "callback that has added some adds them again in on_fit_start"
        )
    for index, group in enumerate(saved_groups):
        saved = set(group["params"])
        now = set(names[index])
        if saved != now:
            raise ValueError(
                f"parameter group {index} of the optimizer differs from the checkpoint's: "
                f"only in the checkpoint {sorted(saved - now)}, only here {sorted(now - saved)}"
            )


def with_params(groups: list[State], params: list[Any]) -> list[State]:
    """Return parameter groups with others in the place of their ``params``."""
    return [
        {**group, "params": group_params}
        for group, group_params in zip(groups, params, strict=True)
    ]
