"""Models that are too big for one device, spread by Accelerate over devices, CPU and disk."""

from __future__ import annotations

from typing import Any

from torch import nn

# Arguments of the function that makes a device map; the others are of the one that spreads the model.
_MAP_OPTIONS = (
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
    """Spread a model, as ``Engine.dispatch_model``.

    Args:
        model: the model, on the CPU.
        device_map: where each part goes, or ``"auto"``.
        options: of both functions of Accelerate.

    Raises:
        ImportError: without Accelerate.
        ValueError: for another ``device_map``, or for options that it makes useless.
    """
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(
            "dispatch_model needs the package accelerate: pip install 'loopwright[big-models]'"
        ) from error
    map_options = {name: options.pop(name) for name in _MAP_OPTIONS if name in options}
    if device_map == "auto":
        device_map = accelerate.infer_auto_device_map(model, **map_options)
    elif map_options:
        raise ValueError(f'{", ".join(map_options)}: for device_map="auto" only')
    elif isinstance(device_map, str):
        raise ValueError(f'device_map must be "auto" or a dict; got {device_map!r}')
    return accelerate.dispatch_model(model, device_map, **options)
