"""Which parts of a module are in evaluation mode while it is trained."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

_MOST_NAMES = 5


def names_in_eval_mode(module: nn.Module, before: set[nn.Module]) -> list[str]:
    """Name the topmost parts of a module that are still in evaluation mode in a fit which trains them.

    What is frozen as a whole, such as a teacher, is not among them, nor what hooks have put into that mode.

    Args:
        module: the module.
        before: its parts that were in evaluation mode before the fit.

    Returns:
        Names and classes, at most five, and how many more there are.
    """
    # Parts that have been decided upon; what is inside of them is not looked at.
    outermost: list[str] = []
    names: list[str] = []
    for name, part in module.named_modules():
        is_inside = any(name.startswith(f"{o}.") or not o for o in outermost)
        if is_inside or part.training or part not in before:
            continue
        if _is_frozen(part):
            outermost.append(name)
        elif any(map(_depends_on_mode, part.modules())):
            outermost.append(name)
            kind = type(part).__name__
            names.append(f"{name} ({kind})" if name else f"all of {kind}")
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES:] = [f"and {len(names) - _MOST_NAMES} more"]
    return names


def _is_frozen(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    is_trained = any(parameter.requires_grad for parameter in parameters)
    return bool(parameters) and not is_trained


def _depends_on_mode(part: nn.Module) -> bool:
    """Whether it may matter to a part, as a layer of its own, that it is in evaluation mode."""
    if part.training:
        return False
    if isinstance(part, _BatchNorm):
        return True
    if isinstance(part, _DropoutNd):
        return part.p > 0
    # What the mode does to other kinds is not known: it counts where they have parameters to train.
    return any(parameter.requires_grad for parameter in part.parameters(recurse=False))
