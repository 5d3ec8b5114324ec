"""What a strategy can do: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What a strategy can do and what it needs: the framework asks for these, and not for the strategy's class.

    Attributes:
        manual_optimization: a step may compute gradients and step optimizers itself.
        needs_equal_forwards: evaluation must run the same number of forward passes in all processes.
        owns_loss_scale: it scales losses itself, without a ``GradScaler``, and sets ``step_was_skipped`` after an
            overflow.
        shards_state: the states that it returns hold a :class:`~.tensor_shards.TensorShard` for each sharded tensor.
        replaces_parameters: ``setup`` gives the module other parameters; ``setup_optimizers`` puts them into optimizers
            that were made before.
        single_module: an Engine can prepare one module only.
        undoes_steps: a step is undone by giving parameters, buffers and optimizers their values of before.
        has_plain_tensors: between two steps, parameters and gradients can be read from the module: they are whole, or
            torch's distributed tensors.
        can_delay_sync: ``keeps_gradients_local`` may be set; then only ``sync_gradients`` averages gradients.
    """

    manual_optimization: bool = True
    needs_equal_forwards: bool = False
    owns_loss_scale: bool = False
    shards_state: bool = False
    replaces_parameters: bool = False
    single_module: bool = False
    undoes_steps: bool = True
    has_plain_tensors: bool = True
    can_delay_sync: bool = False
