"""What a ModelPruning prunes with, and the parts of a module that it works on."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

# By name: the class, for many parameters together, and the function, for one.
_METHODS: dict[str, tuple[Any, Any]] = {
    "ln_structured": (prune.LnStructured, prune.ln_structured),
    "l1_unstructured": (prune.L1Unstructured, prune.l1_unstructured),
    "random_structured": (prune.RandomStructured, prune.random_structured),
    "random_unstructured": (prune.RandomUnstructured, prune.random_unstructured),
}


def method_of(
    pruning_fn: Callable[..., Any] | str, is_global: bool, dim: Any, norm: Any
) -> tuple[Any, dict[str, Any]]:
    """What prunes, as :class:`~.model_pruning.ModelPruning` was asked for it, and its options.

    Args:
        pruning_fn: a name, or a class of a method.
        is_global: whether parameters are pruned together.
        dim: of structured pruning.
        norm: of ``"ln_structured"``.

    Raises:
        ValueError: if they do not fit together.
    """
    options: dict[str, Any] = {}
    if isinstance(pruning_fn, str):
        name = pruning_fn.lower()
        if name not in _METHODS:
            raise ValueError(
                f"pruning_fn {pruning_fn!r} isn't available in PyTorch's pruning: it has {list(_METHODS)}"
            )
        if name.endswith("_structured"):
            options["dim"] = dim
            if dim is None:
                raise ValueError(
                    f"pruning_fn={name!r} prunes along a dimension: pruning_dim should be provided"
                )
        if name == "ln_structured":
            options["n"] = norm
            if norm is None:
                raise ValueError(
                    "When requesting `ln_structured` pruning, the `pruning_norm` should be provided"
                )
        of_many, of_one = _METHODS[name]
        method = of_many if is_global else of_one
    elif inspect.isclass(pruning_fn) and issubclass(
        pruning_fn, prune.BasePruningMethod
    ):
        method = pruning_fn
        if not is_global:
            raise ValueError(
                "a BasePruningMethod is currently only supported with `use_global_unstructured=True`"
            )
    else:
        raise ValueError(
            f"pruning_fn is expected to be a str in {list(_METHODS)}, or a subclass of BasePruningMethod (the class, "
            f"no object of it); got {pruning_fn!r}"
        )
    kind = getattr(method, "PRUNING_TYPE", None)
    if is_global and kind != "unstructured":
        raise ValueError(
            'only the PRUNING_TYPE "unstructured" is supported with `use_global_unstructured=True`; '
            f"{method.__name__} is {kind!r}"
        )
    return method, options


def has_parameter(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of that name itself, maybe under a mask."""
    return isinstance(trained(module, name), nn.Parameter)


def trained(module: nn.Module, name: str) -> Any:
    """The parameter that the optimizer steps: under a mask, it has another name."""
    masked = getattr(module, f"{name}_orig", None)
    return getattr(module, name, None) if masked is None else masked


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with parameters of its own, without masks; buffers and submodules are the same."""
    copied = copy.copy(module)
    parameters = {}
    for name, parameter in vars(module)["_parameters"].items():
        value = None if parameter is None else nn.Parameter(parameter.detach().clone())
        parameters[name.removesuffix("_orig")] = value
    copied.__dict__.update(
        _parameters=parameters,
        _buffers=dict(module._buffers),
        _forward_pre_hooks=OrderedDict(),
    )
    for name in parameters:
        # Under a mask, the module has the masked value as an attribute.
        copied.__dict__.pop(name, None)
    return copied


def zeros_and_size(module: nn.Module, name: str) -> tuple[int, int]:
    """How many numbers of a parameter its mask sets to zero, and how many there are. A host–device sync."""
    mask: Tensor | None = getattr(module, f"{name}_mask", None)
    if mask is None:
        return 0, trained(module, name).numel()
    return int((mask == 0).sum()), mask.numel()
