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
    return named(state, parameter_names(module, optimizer))


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: State) -> None:
    """Load what :func:`named_optimizer_state` returned; parameters may stand in another order now.

    Raises:
        ValueError: if the groups hold other parameters than they did, or, for LBFGS, in another order.
    """
    names = parameter_names(module, optimizer)
    check_same_parameters(state["param_groups"], names)
    if isinstance(optimizer, LBFGS):
        _check_same_order(state["param_groups"], names)
    optimizer.load_state_dict(numbered(state, names))


def named(state: State, names: list[list[str]]) -> State:
    """Return an optimizer's state with names in the place of torch's parameter numbers.

    Args:
        state: as of ``Optimizer.state_dict``.
        names: of the parameters, by group, in the order of the numbers.

    Raises:
        ValueError: if it is the state of fewer or more parameters.
    """
    saved = [len(group["params"]) for group in state["param_groups"]]
    now = [len(group) for group in names]
    if saved != now:
        raise ValueError(
            f"the parameter groups of the optimizer's state hold {saved} parameters, and those here {now}"
        )
    flat = [name for group in names for name in group]
    return {
        **state,
        "state": {flat[number]: value for number, value in state["state"].items()},
        "param_groups": with_params(state["param_groups"], names),
    }


def numbered(state: State, names: list[list[str]]) -> State:
    """Return what :func:`named` returned with torch's numbers, in the order of ``names``, in the place of names."""
    flat = [name for group in names for name in group]
    numbers = {name: number for number, name in enumerate(flat)}
    numbers_by_group = [[numbers[name] for name in group] for group in names]
    return {
        **state,
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": with_params(state["param_groups"], numbers_by_group),
    }


def names_in(state: Any) -> list[list[str]] | None:
    """The names of the parameters in an optimizer's state, by group; None if they have none, as in torch's own."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    names = [group["params"] for group in groups or ()]
    is_named = all(isinstance(name, str) for group in names for name in group)
    return names if names and is_named else None


def is_numbered(state: Any) -> bool:
    """Whether it is an optimizer's state as torch has it, with numbers in the place of the parameters' names."""
    has_groups = isinstance(state, dict) and bool(state.get("param_groups"))
    return has_groups and names_in(state) is None


def number_states(checkpoint: State) -> None:
    """Give a checkpoint its optimizers' states as torch has them; the names go beside, as ``optimizer_parameters``."""
    states = checkpoint.get("optimizer_states", ())
    names = [found for state in states if (found := names_in(state)) is not None]
    if names and len(names) == len(states):
        checkpoint["optimizer_parameters"] = names
        checkpoint["optimizer_states"] = [*map(numbered, states, names)]


def name_states(checkpoint: State) -> None:
    """Undo :func:`number_states`. What was put in the place of the states meanwhile is torch's, too."""
    by_optimizer = checkpoint.pop("optimizer_parameters", ())
    states = checkpoint.get("optimizer_states", ())
    if by_optimizer and len(states) == len(by_optimizer):
        checkpoint["optimizer_states"] = [
            named(state, names) if is_numbered(state) else state
            for state, names in zip(states, by_optimizer, strict=True)
        ]


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
