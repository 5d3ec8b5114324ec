"""Models that are too big for one device, spread out by Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

_OF_THE_MAP = (
    "max_memory",
    "no_split_module_classes",
    "dtype",
    "special_dtypes",
    "clean_result",
    "offload_buffers",
)


def dispatch_model(
    model: nn.Module,
    device_map: str | dict[str, Any],
    options: dict[str, Any],
) -> nn.Module:
    """``Engine.dispatch_model``."""
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(
            "dispatch_model needs the package accelerate: pip install 'loopwright[big-models]'"
        ) from error
    for_map = {name: options.pop(name) for name in _OF_THE_MAP if name in options}
    if device_map == "auto":
        device_map = accelerate.infer_auto_device_map(model, **for_map)
    elif for_map:
        raise ValueError(f'{", ".join(for_map)}: for device_map="auto" only')
    elif isinstance(device_map, str):
        raise ValueError(f'device_map must be "auto" or a dict; got {device_map!r}')
    return accelerate.dispatch_model(model, device_map, **options)
