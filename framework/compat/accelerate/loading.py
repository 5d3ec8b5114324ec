"""Reading weights into a model, whole or part by part to where a map says."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoints import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from .device_maps import device_of, warn_of_parted_ties
from .logging import get_logger
from .offload import load_offloaded_weight, offload_weight, save_offload_index
from .tensors import (
    as_dtype,
    find_tied_parameters,
    retie_parameters,
    set_module_tensor_to_device,
)

_logger = get_logger("accelerate.utils.modeling")


def load_state_dict(
    checkpoint_file: str | os.PathLike[str],
    device_map: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Read weights from one file, safetensors or torch's.

    Args:
        checkpoint_file: the file.
        device_map: where those of a safetensors file are put (default: the CPU); ``"disk"`` is the CPU here.
    """
    path = os.fspath(checkpoint_file)
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location="cpu", weights_only=True)
    state = load_file(path)
    for name in state if device_map else ():
        assert device_map is not None
        part = name
        while part and part not in device_map:
            part = part.rpartition(".")[0]
        device = device_map.get(part, "cpu")
        state[name] = state[name].to("cpu" if device == "disk" else device)
    return state


def load_offloaded_weights(
    model: nn.Module,
    index: Mapping[str, Any] | None,
    offload_folder: str | os.PathLike[str],
) -> None:
    """Read weights from the files of a folder into a model, on the CPU.

    Args:
        model: the model.
        index: their names, with what must be known of them.
        offload_folder: the folder.
    """
    for name, information in (index or {}).items():
        path = os.path.join(offload_folder, f"{name}.dat")
        weight = load_offloaded_weight(path, information)
        set_module_tensor_to_device(model, name, "cpu", value=weight)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: list[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Load weights from a file, or from a folder with ``model.safetensors`` or its parts, into a model.

    Args:
        model: the model, which may be on ``"meta"`` if there is a map.
        checkpoint: the file, the folder, or the JSON index of parts.
        device_map: where each part goes: a device, ``"cpu"`` or ``"disk"``.
        offload_folder: where weights for ``"disk"`` are written.
        dtype: to convert floating-point tensors to, with a map.
        offload_state_dict: keep weights for the CPU on disk until all are read.
        offload_buffers: write buffers to disk, too.
        keep_in_fp32_modules: names of modules that are not converted to float16.
        offload_8bit_bnb: must be False: quantized weights are not served.
        strict: require all names of both.
        full_state_dict: False: the file has this process's part only.
        broadcast_from_rank0: read in the main process only, which sends the others theirs.

    Raises:
        NotImplementedError: for quantized weights.
        ValueError: if there are no weights, or a folder for them is missing.
    """
    if offload_8bit_bnb:
        raise NotImplementedError(
            "load_checkpoint_in_model: offload_8bit_bnb is not served, as quantized weights are not"
        )
    files = _files_of(os.fspath(checkpoint))
    known = set(model.state_dict())
    tied = find_tied_parameters(model)
    unexpected: set[str] = set()
    if device_map is None:
        options = {"full_state_dict": full_state_dict, "strict": strict}
        for file in files:
            unexpected |= _load_whole(model, file, options, broadcast_from_rank0)
    else:
        warn_of_parted_ties(model, device_map)
        reader = _PartByPart(model, device_map, offload_folder, offload_buffers)
        reader.dtype = as_dtype(dtype)
        reader.kept_in_fp32 = keep_in_fp32_modules or []
        with tempfile.TemporaryDirectory() as folder:
            reader.cpu_folder = folder if offload_state_dict else None
            for file in files:
                unexpected |= reader.read(load_state_dict(file, device_map), strict)
            reader.finish()
    unexpected -= known
    if unexpected and not strict:
        _logger.warning(
            f"Some weights of the model checkpoint at {checkpoint} were not used when initializing "
            f"{type(model).__name__}: {unexpected}. This may or may not be an issue - make sure that the checkpoint "
            "does not have unnecessary parameters, or that the model definition correctly corresponds to the "
            "checkpoint."
        )
    retie_parameters(model, tied)


def _load_whole(
    model: nn.Module, file: str, options: dict[str, Any], broadcasts: bool
) -> set[str]:
    """Load a file's weights into a model, which may be sharded; returns their names."""
    # Only here, as this imports torch's distributed checkpoints.
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
    )

    reads = not broadcasts or dist.get_rank() == 0
    state: dict[str, Any] = load_state_dict(file) if reads else {}
    names = set(state)
    places = {value.device.type for value in model.state_dict().values()}
    if "meta" in places and not broadcasts and options["full_state_dict"]:
        model.load_state_dict(state, strict=options["strict"], assign=True)
        return names
    options = {**options, "broadcast_from_rank0": broadcasts}
    set_model_state_dict(model, state, options=StateDictOptions(**options))
    return names


class _PartByPart:
    """Puts weights where a map says.

    Args:
        model: the model.
        device_map: the map.
        folder: where weights for ``"disk"`` are written.
        offload_buffers: write buffers there, too.

    Attributes:
        dtype: to convert floating-point weights to.
        kept_in_fp32: names of modules that are not converted to float16.
        cpu_folder: where weights for the CPU are kept until all are read.

    Raises:
        ValueError: without a folder, if one is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        device_map: Mapping[str, Any],
        folder: str | os.PathLike[str] | None,
        offload_buffers: bool,
    ) -> None:
        if "disk" in device_map.values():
            if folder is None:
                raise ValueError(
                    "At least one of the model submodule will be offloaded to disk, please pass along an "
                    "`offload_folder`."
                )
            os.makedirs(folder, exist_ok=True)
        self.model = model
        self.device_map = device_map
        self.folder = folder
        self.known = set(model.state_dict())
        self.kept: set[str] = set()
        if not offload_buffers:
            self.kept = {name for name, _ in model.named_buffers()}
        self.dtype: Any = None
        self.kept_in_fp32: list[str] = []
        self.cpu_folder: str | None = None
        self.index: dict[str, Any] = {}
        self.cpu_index: dict[str, Any] = {}

    def read(self, state: dict[str, Tensor], strict: bool) -> set[str]:
        """Put a file's weights in their places; returns their names."""
        for name, value in state.items():
            if name in self.known or strict:
                self._put(name, value)
        return set(state)

    def _put(self, name: str, value: Tensor) -> None:
        device = device_of(name, self.device_map)
        dtype = self.dtype
        in_fp32 = any(f"{part}." in name or part == name for part in self.kept_in_fp32)
        if in_fp32 and dtype == torch.float16 and value.is_floating_point():
            dtype = torch.float32
        # A buffer that is not written is needed on a device.
        if device == "disk" and name in self.kept:
            device = "cpu"
        if device == "disk":
            self._write(name, value, dtype, self.folder, self.index)
        elif device == "cpu" and self.cpu_folder is not None:
            self._write(name, value, dtype, self.cpu_folder, self.cpu_index)
        else:
            set_module_tensor_to_device(
                self.model, name, device, value=value, dtype=dtype
            )

    def _write(
        self, name: str, value: Tensor, dtype: Any, folder: Any, index: dict[str, Any]
    ) -> None:
        dtype = value.dtype if dtype is None else dtype
        set_module_tensor_to_device(self.model, name, "meta", dtype=dtype)
        offload_weight(value, name, folder, index)

    def finish(self) -> None:
        """After the last file: note what is on disk, and fetch what is to be on the CPU."""
        if self.folder is not None:
            save_offload_index(self.index, self.folder)
        if self.cpu_folder is not None:
            load_offloaded_weights(self.model, self.cpu_index, self.cpu_folder)


def _files_of(path: str) -> list[str]:
    """The files that hold a checkpoint's weights.

    Raises:
        ValueError: if there are none.
    """
    if os.path.isdir(path):
        for name in (
            SAFE_WEIGHTS_NAME,
            WEIGHTS_NAME,
            SAFE_WEIGHTS_INDEX_NAME,
            WEIGHTS_INDEX_NAME,
        ):
            if os.path.exists(os.path.join(path, name)):
                return _files_of(os.path.join(path, name))
        indices = [name for name in os.listdir(path) if name.endswith(".index.json")]
        if len(indices) == 1:
            return _files_of(os.path.join(path, indices[0]))
        raise ValueError(
            f"{path} is not a folder containing a `.index.json` file or a {WEIGHTS_NAME} or a {SAFE_WEIGHTS_NAME} file"
        )
    if not os.path.exists(path):
        raise ValueError(
            f"`checkpoint` should be the path to a file containing a whole state dict, or the index of a sharded "
            f"checkpoint, or a folder containing a sharded checkpoint or the whole state dict, but got {path}."
        )
    if not path.endswith(".json"):
        return [path]
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    names = sorted(set(index.get("weight_map", index).values()))
    return [os.path.join(os.path.dirname(path), name) for name in names]
