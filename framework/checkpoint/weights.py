"""Files of weights alone: safetensors files, read or written, and those of ``torch.save``, such as Lightning's."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..messages import log
from .manifest import ARCHIVE, manifest_in
from .storage import join, storage_of, without_local_scheme
from .tensors import StagedTensors, is_storable, read_tensors
from .zip_comment import ZIP, comment_in, damaged_record


def is_weights_file(path: str) -> bool:
    """Whether a file is one that :func:`load_weights_file` reads, by its name or its first bytes."""
    if path.endswith(".safetensors"):
        return True
    return storage_of(path).read(path, len(ZIP)) == ZIP


def load_weights_file(
    path: str,
    map_location: Any = None,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """What of a checkpoint is in a file: ``state_dict``; all that is in a Lightning checkpoint, and in one of ours.

    Args:
        path: of the file.
        map_location: as of ``torch.load``.
        weights_only: False lets torch unpickle what another program has written, which can run code.

    Raises:
        ValueError: if it is damaged, holds objects that are not to be loaded, or no weights.
        CheckpointError: if it is one of ours, and damaged.
    """
    content = storage_of(path).read(path)
    if path.endswith(".safetensors"):
        try:
            return {"state_dict": read_tensors(content, map_location)}
        except Exception as error:
            # The library has errors of its own.
            raise ValueError(
                f"{path!r} is no safetensors file, or damaged: {error}"
            ) from error
    is_ours = _verify(content, path)
    loaded = _load(content, path, map_location, is_ours or weights_only is not False)
    if not isinstance(loaded, dict):
        loaded = {"state_dict": loaded}
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path!r} holds no state_dict; its content is a {type(state).__name__}"
        )
    if state is loaded and not any(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{path!r} holds no state_dict and no tensors; its keys are {', '.join(map(repr, state))}"
        )
    weights: dict[str, Any] = {"state_dict": state}
    if "pytorch-lightning_version" in loaded:
        weights = dict(loaded)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in loaded:
            weights[key] = dict(loaded[key])
    # Lightning notes the name of an argument that holds all hyperparameters, as a dict or Namespace.
    name = loaded.get("hparams_name")
    if "hyper_parameters" in weights and name not in (None, "kwargs"):
        weights["hyper_parameters_call"] = {"arguments": [name], "whole": [name, ""]}
    return weights


def _verify(content: bytes, path: str) -> bool:
    """Whether a file of ``torch.save`` is a checkpoint of ours, as it was written; False for another program's.

    Raises:
        CheckpointError: if it was altered, naming the part.
    """
    manifest = manifest_in(path, content)
    if manifest is None:
        damaged = damaged_record(content)
        if damaged:
            raise CheckpointError(f"{path!r} is damaged: {damaged} was altered")
        return False
    found = comment_in(content)
    assert found is not None, "a manifest was found in it"
    written = manifest["files"][ARCHIVE]
    archive = memoryview(content)[: -found[1]]
    if (len(archive), zlib.crc32(archive)) != (written["size"], written["crc32"]):
        damaged = damaged_record(content) or "what is between its records"
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {damaged} was altered (its checksum differs)"
        )
    return True


def _load(content: bytes, path: str, map_location: Any, weights_only: bool) -> Any:
    """What ``torch.save`` wrote."""
    location = "cpu" if map_location is None else map_location
    file = io.BytesIO(content)
    try:
        return torch.load(file, map_location=location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path!r} holds pickled objects beside tensors and plain values, which could run code, and is not opened: "
            "pass weights_only=False if you trust it, or load it where it was made, and save its state_dict alone. "
            f"torch says: {error}"
        ) from error
    except Exception as error:
        # A file that torch did not write, or that was made to harm, may make it raise anything.
        raise ValueError(
            f"{path!r} cannot be read as a file of torch.save: {error}"
        ) from error


def export_weights(
    state: dict[str, Any],
    path: str,
    dtype: torch.dtype | None = None,
    share: bool = False,
) -> int:
    """Write a module's ``state_dict`` to one safetensors file, all at once.

    Args:
        state: what is no tensor in it is left out, with a line that names it.
        path: the file, local or any fsspec URL; one that is there is replaced.
        dtype: to convert floating-point tensors to.
        share: write tied weights once, under the first of their names; otherwise under each, for any program to find.

    Returns:
        How many bytes the tensors take.

    Raises:
        ValueError: if ``path`` is a folder.
        OSError: if it cannot be written.
    """
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(
            f"the weights go into one file, such as {join(path, 'model.safetensors')!r}; got {path!r}"
        )
    path = without_local_scheme(path)
    tensors = {}
    for name, value in state.items():
        if is_storable(value):
            is_converted = dtype is not None and value.is_floating_point()
            tensors[name] = value.to(dtype) if is_converted else value
    left_out = state.keys() - tensors.keys()
    if left_out:
        log.warning(
            "Export: left out %s, no tensors that safetensors can hold",
            ", ".join(sorted(left_out)),
        )
    staged = StagedTensors(tensors, copy=False, share=share)
    with storage_of(path).replacing(path) as file:
        for chunk in staged.chunks():
            file.write(chunk)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
