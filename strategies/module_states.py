"""How the states of a strategy's module and optimizers go in and out: the part of the contract that checkpoints use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizer_state import State, load_optimizer_state, named_optimizer_state
from .stored_tensors import filled, stored_items
from .tensor_shards import TensorPairs, TensorShard


class ModuleStates:
    """States by name, for any strategy to take up; a strategy that shards them overrides these.

    Attributes:
        module: the module.
    """

    module: nn.Module

    def model_state(self) -> State:
        """Parameters and buffers by name; the tensors may be the module's own, which the next step changes."""
        return self.module.state_dict()

    def load_model_state(self, state: State, strict: bool) -> Any:
        """Load what :meth:`model_state` returned.

        Args:
            state: whole tensors by name. They may be in files still, and be read as they are asked for.
            strict: whether the names must be exactly the module's.

        Returns:
            What ``nn.Module.load_state_dict`` does.
        """
        state = filled(state, self.module)
        return self.module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """``{"state": {parameter name: {...}}, "param_groups": [{..., "params": [names]}]}``, for any strategy."""
        return named_optimizer_state(self.module, optimizer, optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """Load what :meth:`optimizer_state` returned, matching parameters by name.

        Args:
            optimizer: of the same kind.
            state: whole tensors by name, as of :meth:`load_model_state`.
        """
        load_optimizer_state(self.module, optimizer, state)

    # Other weights than those that are trained, such as their average.

    def saved_part(
        self, state: State, name: str, present: Tensor | TensorShard
    ) -> Tensor:
        """What this process keeps of a tensor of a state that is loaded.

        Args:
            state: as of :meth:`load_model_state`.
            name: of the tensor.
            present: what :meth:`model_state` has by this name.
        """
        if isinstance(present, Tensor):
            return state[name]
        return present.slice_of(stored_items(state)[name])

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this process has of a parameter, in the precision in which it is trained, or of a buffer; a view."""
        return tensor.data

    def evaluated_part(self, tensor: Tensor, value: Tensor) -> TensorPairs:
        """What is to be changed for an evaluation with another value of a parameter or buffer. It may be a collective.

        Args:
            tensor: the module's.
            value: the other value, of the form that :meth:`local_part` has.

        Returns:
            Pairs of what evaluation reads, and what is to be copied there.
        """
        return [(self.local_part(tensor), value)]
