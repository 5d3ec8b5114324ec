"""Policies that select submodules, by class or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakSet

from torch import nn

# Module classes, or a function that says yes or no to a submodule.
Policy = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[nn.Module], bool]

# Modules that compute their activations again already: torch's function refuses a second call.
_checkpointed: WeakSet[nn.Module] = WeakSet()


def matches(policy: Policy, module: nn.Module) -> bool:
    """Whether the policy chooses ``module``.

    Raises:
        TypeError: if it is neither classes nor a function.
    """
    classes = (policy,) if isinstance(policy, type) else policy
    if isinstance(classes, (set, frozenset, list, tuple)) and all(
        isinstance(kind, type) for kind in classes
    ):
        return isinstance(module, tuple(classes))
    if callable(policy):
        return bool(policy(module))
    raise TypeError(
        f"a policy must be module classes, or a function of a submodule; got {policy!r}"
    )


def checkpoint_activations(module: nn.Module, policy: Policy | None) -> None:
    """Let the chosen submodules compute their activations again in the backward pass rather than keep them.

    Raises:
        ValueError: if none is chosen.
    """
    if policy is None:
        return
    # Of torch's functions for this, the one that changes neither names nor classes of the modules.
    from torch.distributed._composable.checkpoint_activation import checkpoint

    chosen = [child for child in module.modules() if matches(policy, child)]
    if not chosen:
        raise ValueError(
            f"activation_checkpointing={policy!r} chooses no submodule of {type(module).__name__}"
        )
    for child in chosen:
        # A module may be set up once for each of several runs.
        if child not in _checkpointed:
            checkpoint(child)
            _checkpointed.add(child)
