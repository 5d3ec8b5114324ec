"""Accelerate's small functions for files, processes and modules."""

from __future__ import annotations

import os
import platform
import re
import socket
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.weights import export_weights
from ...engine.prepared import unwrapped
from .logging import get_logger
from .state import PartialState

_logger = get_logger("accelerate.utils.other")


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
    """The tensors of a state, contiguous, tied ones once; a warning names those that are left out."""
    seen: set[Any] = set()
    removed: list[str] = []
    kept = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            kept[name] = value
            continue
        place = value.data_ptr(), value.shape, value.dtype
        if value.numel() and place in seen:
            removed.append(name)
            continue
        seen.add(place)
        kept[name] = value.contiguous()
    if removed:
        _logger.warning(
            "Removed shared tensor %s while saving: each is in the file under the first of its names, and loading the "
            "file into such a model ties them again",
            removed,
        )
    return kept


def extract_model_from_parallel(
    model: Any,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> Any:
    """The module that was prepared, or wrapped by torch's DataParallel or DistributedDataParallel.

    Args:
        model: the model.
        keep_fp32_wrapper: False restores ``model._original_forward``, if there is one.
        keep_torch_compile: False gives the module that was given to ``torch.compile``.
        recursive: unwrap the model's parts, too.
    """
    model = unwrapped(model)
    compiled = model if _original_of(model) is not None else None
    if compiled is not None:
        model = _original_of(compiled)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if recursive:
        _unwrap_parts(model)
    if not keep_fp32_wrapper:
        _restore_forward(model)
    if compiled is None or not keep_torch_compile:
        return model
    if "_orig_mod" in vars(compiled):
        vars(compiled)["_orig_mod"] = model
    else:
        compiled._orig_mod = model
    return compiled


def _original_of(model: Any) -> Any:
    """What was given to ``torch.compile``; None for a module that is not compiled, though it may wrap one that is."""
    return {**vars(model), **getattr(model, "_modules", {})}.get("_orig_mod")


def _unwrap_parts(model: nn.Module) -> None:
    for name, part in model.named_children():
        child: Any = part
        while hasattr(child, "module"):
            child = child.module
        setattr(model, name, child)
        _unwrap_parts(child)


def _restore_forward(model: Any) -> None:
    """Take off what was put around a model's ``forward``."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    vars(model).pop("forward", None)
    # One that an object had of its own, and not of its class, stays its own.
    if original != model.forward:
        vars(model)["forward"] = original


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
    """Warn of a Linux kernel with which processes can hang."""
    machine = platform.uname()
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", machine.release)
    if machine.system != "Linux" or found is None:
        return
    if tuple(int(number) for number in found.groups()) < (5, 5, 0):
        _logger.warning(
            f"The kernel's version is {found[0]}: with those before 5.5.0 processes can hang, so please upgrade it"
        )


def get_model_tp_size(model: Any) -> int | None:
    """By how many processes transformers has divided each layer of a model; None if it has not."""
    size = getattr(model, "tp_size", None)
    if size is not None:
        return size
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if isinstance(config, dict):
        return config.get("tp_size")
    return getattr(config, "tp_size", None)


def is_repeated_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of modules of one class."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    kind = type(module[0])
    return all(isinstance(block, kind) for block in module)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether there is a list of modules of one class anywhere in a module."""
    return any(is_repeated_blocks(part) for part in module.modules())


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compile repeated blocks one by one, and what is beside them, which takes less time than the whole.

    Args:
        module: the model, which stays as it is.
        **compile_kwargs: arguments of ``torch.compile``.

    Returns:
        A model with compiled parts and the same parameters; its ``_orig_mod`` is the model.
    """
    compiled = _with_compiled_parts(module, compile_kwargs)
    if _original_of(compiled) is None:
        # Not as a part, which would count its parameters twice.
        vars(compiled)["_orig_mod"] = module
    return compiled


def _with_compiled_parts(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    if is_repeated_blocks(module):
        blocks = [torch.compile(block, **options) for block in module.children()]
        return nn.ModuleList(blocks)  # type: ignore[arg-type] # compiled modules are modules
    if not has_repeated_blocks(module):
        return torch.compile(module, **options)  # type: ignore[return-value] # as above
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    for name, value in list(vars(twin).items()):
        # A method that was put on the object would go on to work with the original.
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(twin)[name] = MethodType(value.__func__, twin)
    vars(twin)["_modules"] = {
        name: _with_compiled_parts(child, options)
        for name, child in module.named_children()
    }
    return twin


def compile_regions_deepspeed(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compile repeated blocks one by one, and what is beside them, in place.

    Args:
        module: the model.
        **compile_kwargs: arguments of ``torch.compile``.

    Returns:
        The model.
    """
    if has_repeated_blocks(module) and not is_repeated_blocks(module):
        for child in module.children():
            compile_regions_deepspeed(child, **compile_kwargs)
        return module
    blocks = module.children() if is_repeated_blocks(module) else [module]
    for block in blocks:
        block.compile(**compile_kwargs)
    return module


compile_regions_fsdp2 = compile_regions_deepspeed
