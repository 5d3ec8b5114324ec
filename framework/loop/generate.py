"""Text that a Hugging Face model generates in an evaluation."""

from __future__ import annotations

from typing import Any

from ..module import Module


def generate(module: Module, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a model generate inside ``validation_step``, ``test_step`` or ``predict_step``, under every strategy.

    Where a model is divided among processes, each runs as many forward passes as the one with the longest text, as
    none could go on alone.

    Args:
        module: whose step it is: ``self``.
        model: its submodule with a ``generate``.
        *args: of that.
        **kwargs: of that.

    Returns:
        What the model's ``generate`` returns.
    """
    strategy = module.trainer.strategy
    synced = strategy.world_size > 1 and strategy.capabilities.needs_equal_forwards
    return model.generate(*args, **{"synced_gpus": synced, **kwargs})
