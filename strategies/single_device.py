"""One process, one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .base import Strategy
from .precision import Precision


class SingleDeviceStrategy(Strategy):
    """Runs a module on one CPU, CUDA, MPS or XPU device in this process."""

    name = "single"

    def setup_environment(self, devices: list[torch.device], num_nodes: int) -> None:
        if len(devices) != 1 or num_nodes != 1:
            raise ValueError(
                f"strategy={self.name!r} runs in one process on one device; got devices={len(devices)}, "
                f"num_nodes={num_nodes}"
            )
        self.device = devices[0]
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        self.module = module
        module.to(self.device)
        precision.convert_module(module)
        self._context = precision.forward_context(self.device)
        return module

    def forward(self, step_name: str, *args: Any) -> Any:
        # As StepModule does, without the frames of nn.Module.__call__: there is nothing here to intercept it.
        if self._context is None:
            return getattr(self.module, step_name)(*args)
        with self._context:
            return getattr(self.module, step_name)(*args)

    def model_state(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_model_state(self, state: dict[str, Any], strict: bool) -> Any:
        return self.module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return rename_optimizer_state(optimizer.state_dict(), parameter_names(self.module, optimizer))

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        names = parameter_names(self.module, optimizer)
        optimizer.load_state_dict(number_optimizer_state(state, names))


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, group by group; one that the module lacks gets a name of its place."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [names.get(id(parameter), f"optimizer.group{g}.param{i}") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def rename_optimizer_state(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Replace torch's parameter numbers by names."""
    flat = [name for group in names for name in group]
    return {
        **state,
        "state": {flat[number]: value for number, value in state["state"].items()},
        "param_groups": [{**group, "params": n} for group, n in zip(state["param_groups"], names, strict=True)],
    }


def number_optimizer_state(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The inverse of :func:`rename_optimizer_state`, for parameters that may stand in another order now.

    Raises:
        ValueError: if the groups hold other parameters than they did.
    """
    groups = state["param_groups"]
    if len(groups) != len(names):
        raise ValueError(f"the checkpoint's optimizer has {len(groups)} parameter groups, this one has {len(names)}")
    for index, (group, now) in enumerate(zip(groups, names, strict=True)):
        missing, new = sorted(set(group["params"]) - set(now)), sorted(set(now) - set(group["params"]))
        if missing or new:
            raise ValueError(
                f"parameter group {index} of the optimizer differs from the checkpoint's: "
                f"only in the checkpoint {missing}, only here {new}"
            )
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    return {
        **state,
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in now]} for group, now in zip(groups, names, strict=True)
        ],
    }
