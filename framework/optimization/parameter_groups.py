"""Groups of a module's parameters for an optimizer: which of them decay, and which learning rate each layer has."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_KINDS = ("norms", "biases", "embeddings")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    lr: float | None = None,
    no_decay: Collection[str] = ("norms", "biases"),
    layer_decay: float = 1.0,
    layers: Sequence[nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """Sort a module's parameters into groups for an optimizer.

    Each parameter that is trained (``requires_grad``) is in one group. A norm or an embedding is known by its class:
    torch's, or another whose name says so, such as ``LlamaRMSNorm``; a bias by its name. A parameter that is shared
    counts as what it is first.

    Args:
        module: whose parameters.
        weight_decay: of all that decay.
        lr: the highest learning rate. None leaves it to the optimizer.
        no_decay: which do not decay: any of ``"norms"``, ``"biases"`` and ``"embeddings"``.
        layer_decay: the learning rate of each layer is that of the one above it, multiplied by this. What the module
            defines before its layers, such as embeddings, counts as one more below them, and all after as one above.
            See https://arxiv.org/abs/2003.10555.
        layers: these layers, from the input on. Default: the longest ``nn.ModuleList`` or ``nn.Sequential``.

    Returns:
        Groups, with ``params``, ``weight_decay``, ``lr`` if that is given, and a ``name`` by which a
        ``LearningRateMonitor`` logs them: ``torch.optim.AdamW(parameter_groups(self, weight_decay=0.1))``.

    Raises:
        ValueError: if ``no_decay`` names something else; for a ``layer_decay`` without ``lr`` or layers.
    """
    if isinstance(no_decay, str) or not set(no_decay) <= set(_KINDS):
        raise ValueError(f"no_decay must hold any of {_KINDS}; got {no_decay!r}")
    depths: dict[nn.Parameter, int] = {}
    top = 0
    if layer_decay != 1.0:
        if lr is None or not 0.0 < layer_decay <= 1.0:
            raise ValueError(
                "layer_decay must be above 0.0 and at most 1.0, and needs lr; got "
                f"layer_decay={layer_decay!r}, lr={lr!r}"
            )
        layers = _longest(module) if layers is None else layers
        depths = _depths(module, layers)
        top = len(layers) + 1
    groups: dict[str, dict[str, Any]] = {}
    for parameter, kind in _trained(module):
        decays = kind not in no_decay
        name = "decay" if decays else "no_decay"
        depth = depths.get(parameter, top)
        if layer_decay != 1.0:
            name = f"layer{depth}/{name}"
        if name not in groups:
            decay = weight_decay if decays else 0.0
            groups[name] = {"params": [], "weight_decay": decay, "name": name}
            if lr is not None:
                groups[name]["lr"] = lr * layer_decay ** (top - depth)
        groups[name]["params"].append(parameter)
    return list(groups.values())


def _trained(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters that are trained, each with its kind; that of most is ``"weights"``."""
    seen = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield parameter, _kind(part, name)


def _kind(owner: nn.Module, name: str) -> str:
    class_name = type(owner).__name__.lower()
    if isinstance(owner, _NORMS) or class_name.endswith("norm"):
        return "norms"
    if "bias" in name:
        return "biases"
    if isinstance(owner, _EMBEDDINGS) or class_name.endswith("embedding"):
        return "embeddings"
    return "weights"


def _longest(module: nn.Module) -> Sequence[nn.Module]:
    """The layers of a module: those in its longest list of parts."""
    lists = [
        m for m in module.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))
    ]
    if not lists:
        raise ValueError(
            f"layer_decay: {type(module).__name__} has no nn.ModuleList or nn.Sequential of layers; pass layers=[...]"
        )
    return list(max(lists, key=len).children())


def _depths(module: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """At which layer, counted from 1, each parameter is; 0 for those before the layers, none for those after."""
    depths = {
        parameter: depth
        for depth, layer in enumerate(layers, start=1)
        for parameter in layer.parameters()
    }
    for parameter in module.parameters():
        if parameter in depths:
            break
        depths[parameter] = 0
    return depths
