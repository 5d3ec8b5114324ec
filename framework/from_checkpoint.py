"""Modules and DataModules made from a checkpoint: constructed anew, with its weights."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..strategies.optimizer_state import number_states
from ..strategies.stored_tensors import filled, stored_items
from .checkpoint.class_paths import INSTANTIATOR, instantiate_module
from .checkpoint.configs import rebuild
from .checkpoint.find import resolve
from .checkpoint.manifest import naming_damage
from .checkpoint.reader import load_checkpoint, open_checkpoint
from .checkpoint.serialization import require_loaded, with_stored
from .checkpoint.tensors import device_of
from .errors import CheckpointError


def _leave_meta(module: nn.Module, state: dict[str, Any], device: Any) -> None:
    """Give tensors of a module that are on the meta device memory, to load a state into.

    Raises:
        ValueError: if one of them is not in the state.
    """
    made: dict[Tensor, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        ):
            if not tensor.is_meta:
                continue
            full_name = f"{path}.{name}".lstrip(".")
            if full_name not in state:
                raise ValueError(
                    f"{full_name} is on the meta device, and the checkpoint does not hold it: make it on a real device"
                )
            if tensor not in made:
                made[tensor] = torch.empty_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
            setattr(part, name, made[tensor])


def load_weights(
    load: Any,
    module: Any,
    checkpoint: dict[str, Any],
    path: Any,
    strict: bool,
) -> None:
    """Load the weights that a checkpoint holds.

    Args:
        load: called with the weights by name, and ``strict``.
        module: named in the error.
        checkpoint: what was read.
        path: of the checkpoint, for the error.
        strict: whether the names must be exactly the module's.

    Raises:
        CheckpointError: if it is of another architecture, or holds objects that were not loaded.
    """
    require_loaded(checkpoint["state_dict"])
    try:
        load(checkpoint["state_dict"], strict)
    except RuntimeError as error:
        made_by = checkpoint.get("manifest", {}).get("module", "another module")
        raise CheckpointError(
            f"checkpoint {path!r} (of {made_by}) is for another architecture than {type(module).__name__}: "
            f"{error}\nConstruct the module as it was saved, or set its strict_loading=False to load what fits by name"
        ) from error


def with_weight_set(
    checkpoint: dict[str, Any], name: str | None, path: Any
) -> dict[str, Any]:
    """The weights that a checkpoint holds, or other ones that it holds beside them.

    Args:
        checkpoint: what was read.
        name: of the other ones; None for the module's own.
        path: of the checkpoint, for the error.

    Raises:
        CheckpointError: if it does not hold them.
    """
    if name is None:
        return checkpoint["state_dict"]
    saved = checkpoint.get("weight_sets", {})
    if name not in saved:
        names = ", ".join(map(repr, saved)) or "none"
        raise CheckpointError(
            f"checkpoint {path!r} holds no weight_set {name!r}; those that it holds: {names}"
        )
    return with_stored(
        {**stored_items(checkpoint["state_dict"]), **stored_items(saved[name])}
    )


def construct(
    cls: type[Any],
    path: str,
    checkpoint: dict[str, Any],
    key: str,
    overrides: dict[str, Any],
) -> Any:
    """Construct an object from the hyperparameters that a checkpoint holds.

    Args:
        cls: the class to construct.
        path: of the checkpoint, for errors.
        checkpoint: what was read.
        key: of the hyperparameters in it.
        overrides: arguments instead of them, or beside them.

    Raises:
        CheckpointError: if an argument is missing, or is an object that was not loaded.
    """
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    saved = checkpoint.get(key, {})
    if isinstance(saved, dict) and INSTANTIATOR in saved:
        return instantiate_module(cls, {**saved, **overrides})
    with naming_damage(path, "its hyperparameters are not as they should be"):
        call = checkpoint.get(f"{key}_call") or {
            "arguments": list(saved),
            "whole": None,
        }
        kinds = call.get("kinds", {})
        if call["whole"] is not None:
            name, kind = call["whole"]
            saved = {name: saved}
            kinds = {name: kind}
        recorded = {
            name: value
            for name, value in saved.items()
            if name in call["arguments"] and (takes_any or name in parameters)
        }
    arguments = {**recorded, **overrides}
    require_loaded(arguments)
    for name in kinds.keys() & recorded.keys() - overrides.keys():
        arguments[name] = rebuild(cls, name, kinds[name], recorded[name])
    missing = [
        name
        for name, p in list(parameters.items())[1:]
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise CheckpointError(
            f"checkpoint {path!r} has no hyperparameters {', '.join(missing)} for {cls.__name__}: pass them to "
            "load_from_checkpoint, or call self.save_hyperparameters() in __init__ before training"
        )
    return cls(**arguments)


def datamodule_from_checkpoint(
    cls: type[Any],
    path: Any,
    weights_only: bool | None,
    overrides: dict[str, Any],
) -> Any:
    """Do what ``DataModule.load_from_checkpoint`` says."""
    path = resolve(os.fspath(path))
    checkpoint = load_checkpoint(path, weights_only)
    datamodule = construct(
        cls,
        path,
        checkpoint,
        "datamodule_hyper_parameters",
        overrides,
    )
    if "datamodule" in checkpoint:
        require_loaded(checkpoint["datamodule"])
        datamodule.load_state_dict(checkpoint["datamodule"])
    return datamodule


def module_from_checkpoint(
    cls: type[Any],
    path: Any,
    map_location: Any,
    strict: bool | None,
    weights_only: bool | None,
    weight_set: str | None,
    overrides: Any,
) -> Any:
    """Do what ``Module.load_from_checkpoint`` says."""
    path = resolve(os.fspath(path))
    checkpoint = open_checkpoint(path, weights_only, map_location)
    checkpoint["state_dict"] = with_weight_set(checkpoint, weight_set, path)
    module = construct(cls, path, checkpoint, "hyper_parameters", overrides)
    is_meta = any(tensor.is_meta for tensor in module.parameters())
    if map_location is not None and not is_meta:
        module.to(device_of(map_location))
    module.configure_model()
    number_states(checkpoint)
    module.on_load_checkpoint(checkpoint)
    exact = module.strict_loading if strict is None else strict
    _leave_meta(module, checkpoint["state_dict"], device_of(map_location))
    load_weights(
        lambda state, s: module.load_state_dict(filled(state, module), strict=s),
        module,
        checkpoint,
        path,
        exact,
    )
    return module
