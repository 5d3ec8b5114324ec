"""Policies that select submodules, by class or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast
from weakref import WeakSet

from torch import nn

# Module classes, or a function that says yes or no to a submodule.
Policy = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[nn.Module], bool]

# These containers have no forward of their own, before which their parameters could be gathered.
WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

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


def modules_to_wrap(module: nn.Module, policy: Policy | int | None) -> list[nn.Module]:
    """Return the submodules to be gathered by themselves, inner ones first.

    Args:
        module: the user's.
        policy: classes, a function of a submodule, a number of parameters, or None for the children of each
            ``nn.ModuleList`` and ``nn.Sequential``.
    """
    if policy is None:
        chosen = _blocks(module)
    elif isinstance(policy, int) and not isinstance(policy, bool):
        chosen = _of_size(module, policy)
    else:
        chosen = {
            id(child)
            for child in module.modules()
            if child is not module and matches(cast(Policy, policy), child)
        }
    return [
        child
        for child in reversed(list(module.modules()))
        if id(child) in chosen
        and any(True for _ in child.parameters())
        and not isinstance(child, WITHOUT_FORWARD)
    ]


def _blocks(module: nn.Module) -> set[int]:
    """Ids of the children of ``nn.ModuleList``s and ``nn.Sequential``s, but for those that are such containers."""
    blocks: set[int] = set()
    containers: set[int] = set()
    for child in module.modules():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            containers.add(id(child))
            blocks.update(id(block) for block in child.children())
    return blocks - containers


def _of_size(module: nn.Module, min_parameters: int) -> set[int]:
    """Ids of submodules to be gathered by themselves, by their size.

    Args:
        module: the user's.
        min_parameters: a submodule is chosen if it has so many, without those of submodules in it that are chosen.
    """
    chosen: set[int] = set()

    def count_remaining(child: nn.Module) -> int:
        """Return how many parameters are left to the parent of ``child``."""
        total = sum(parameter.numel() for parameter in child.parameters(recurse=False))
        total += sum(map(count_remaining, child.children()))
        if total >= min_parameters and child is not module:
            chosen.add(id(child))
            return 0
        return total

    count_remaining(module)
    return chosen
