"""Accelerate's small functions for files, processes and modules."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.weights import export_weights
from ...engine.prepared import unwrapped
from .state import PartialState


def save(
    obj: Any,
    f: Any,
    save_on_each_node: bool = False,
    safe_serialization: bool = False,
) -> None:
    """Write an object to a file, in one process only.

    Args:
        obj: anything, or tensors by name.
        f: the file.
        save_on_each_node: in the main process of each machine, and not of one only.
        safe_serialization: as safetensors.
    """
    state = PartialState()
    is_here = (
        state.is_local_main_process if save_on_each_node else state.is_main_process
    )
    if not is_here:
        return
    if safe_serialization:
        export_weights(clean_state_dict_for_safetensors(obj), os.fspath(f), share=True)
    else:
        torch.save(obj, f)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Read what :func:`save` wrote; ``weights_only=False`` lets objects be loaded, which can run code."""
    kwargs.setdefault("weights_only", True)
    return torch.load(f, map_location=map_location, **kwargs)


def clean_state_dict_for_safetensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a state, contiguous, tied ones once."""
    seen: set[Any] = set()
    kept = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            kept[name] = value
            continue
        place = value.data_ptr(), value.shape, value.dtype
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = value.contiguous()
    return kept


def extract_model_from_parallel(
    model: nn.Module,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> Any:
    """The module that was prepared, or wrapped by torch's DataParallel or DistributedDataParallel.

    Args:
        model: the model.
        keep_fp32_wrapper: accepted: there is nothing in between here.
        keep_torch_compile: False gives the module that was given to ``torch.compile``.
        recursive: accepted, as ``keep_fp32_wrapper``.
    """
    model = unwrapped(model)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model if keep_torch_compile else getattr(model, "_orig_mod", model)


def wait_for_everyone() -> None:
    """Wait for all processes."""
    PartialState().wait_for_everyone()


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Merge dicts in dicts; returns ``destination``."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def is_port_in_use(port: int | str | None = None) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(("localhost", int(port or 29500))) == 0


def convert_bytes(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def recursive_getattr(obj: Any, attr: str) -> Any:
    """An attribute by its dotted name."""
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def get_pretty_name(obj: Any) -> str:
    """What to call an object."""
    if not hasattr(obj, "__qualname__") and not hasattr(obj, "__name__"):
        obj = getattr(obj, "__class__", obj)
    return getattr(obj, "__qualname__", None) or getattr(obj, "__name__", str(obj))


def is_compiled_module(module: nn.Module) -> bool:
    """Whether a module was given to ``torch.compile``."""
    return hasattr(module, "_orig_mod")


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is one of PEFT's."""
    kinds = type(extract_model_from_parallel(model)).__mro__
    return any(kind.__module__.startswith("peft.") for kind in kinds)


def has_compiled_regions(module: nn.Module) -> bool:
    """Whether a part of a module was given to ``torch.compile``."""
    return any(is_compiled_module(part) for part in module.modules())


def model_has_dtensor(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes."""
    return any(hasattr(one, "device_mesh") for one in model.parameters())


def check_os_kernel() -> None:
    """Nothing: kernels with which processes hang are of the past."""
