"""A module whose ``forward`` calls a method of another one, by name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn


class StepModule(nn.Module):
    """Calls any step of a module through ``forward``, which DDP, FSDP and DeepSpeed intercept.

    Where nothing intercepts the call, ``Strategy.evaluate`` does the same in fewer frames of Python.
    """

    def __init__(
        self, module: nn.Module, context: AbstractContextManager[Any] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.context = context

    def compute_in(self, context: AbstractContextManager[Any] | None) -> None:
        """Call the steps in this context from now on."""
        self.context = context

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the step in the precision's context."""
        if self.context is None:
            return getattr(self.module, step_name)(*args, **kwargs)
        with self.context:
            return getattr(self.module, step_name)(*args, **kwargs)
