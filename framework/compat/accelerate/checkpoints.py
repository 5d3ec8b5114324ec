"""Accelerate's folders: where an Accelerator saves its state and its models, and how it names what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...checkpoint.weights import export_weights
from ...messages import log
from .options import ProjectConfiguration

if TYPE_CHECKING:
    from .accelerator import Accelerator

SAFE_WEIGHTS_NAME = "model.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "pytorch_model.bin"
WEIGHTS_INDEX_NAME = "pytorch_model.bin.index.json"
# Accelerate's names of files; a checkpoint here has others, and these are for programs that ask.
MODEL_NAME = "pytorch_model"
SAFE_MODEL_NAME = "model"
OPTIMIZER_NAME = "optimizer"
SCHEDULER_NAME = "scheduler"
SAMPLER_NAME = "sampler"
SCALER_NAME = "scaler.pt"
RNG_STATE_NAME = "random_states"
PROFILE_PATTERN_NAME = "profile_{suffix}.json"
WEIGHTS_PATTERN_NAME = "pytorch_model{suffix}.bin"
SAFE_WEIGHTS_PATTERN_NAME = "model{suffix}.safetensors"

_UNITS = {
    "GIB": 2**30,
    "MIB": 2**20,
    "KIB": 2**10,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
}


def convert_file_size_to_int(size: int | str) -> int:
    """A number of bytes, such as of ``"10GB"`` or ``"200MiB"``.

    Raises:
        ValueError: for another format.
    """
    if isinstance(size, int):
        return size
    for unit, factor in _UNITS.items():
        number = size.upper().removesuffix(unit)
        if size.upper().endswith(unit) and number.isdecimal():
            return int(number) * factor
    raise ValueError(f"{size!r} is no size such as '10GB' or '200MiB'")


def next_folder(project: ProjectConfiguration) -> str:
    """The folder of the next automatically named checkpoint.

    Raises:
        ValueError: if it is there already.
    """
    base = os.path.join(project.project_dir or ".", "checkpoints")
    path = os.path.join(base, f"checkpoint_{project.iteration}")
    if os.path.exists(path):
        raise ValueError(
            f"Checkpoint directory {path} ({project.iteration}) already exists. Please manually override "
            "`self.save_iteration` with what iteration to start with."
        )
    return path


def checkpoints_of(project: ProjectConfiguration) -> list[str]:
    """The automatically named checkpoints, the oldest first."""
    base = os.path.join(project.project_dir or ".", "checkpoints")
    names = os.listdir(base) if os.path.isdir(base) else []
    numbered = [name for name in names if re.fullmatch(r"checkpoint_\d+", name)]
    numbered.sort(key=lambda name: int(name.rpartition("_")[2]))
    return [os.path.join(base, name) for name in numbered]


def keep_within_limit(project: ProjectConfiguration) -> None:
    """Remove the oldest checkpoints, so that not more are left than the limit says."""
    limit = project.total_limit
    if limit is None:
        return
    for path in checkpoints_of(project)[: -max(1, limit)]:
        shutil.rmtree(path)


def folder_to_load(project: ProjectConfiguration, input_dir: Any) -> str:
    """The folder of a checkpoint, by default the newest one that was automatically named.

    Args:
        project: names them.
        input_dir: as it was passed.

    Raises:
        ValueError: if there is none.
    """
    if input_dir is not None:
        path = os.path.expanduser(os.fspath(input_dir))
        if "://" not in path and not os.path.isdir(path):
            raise ValueError(f"Tried to find {path} but folder does not exist")
        return path
    if not project.automatic_checkpoint_naming:
        raise ValueError(
            "No input_dir provided and automatic checkpoint naming is disabled."
        )
    found = checkpoints_of(project)
    if not found:
        raise ValueError(
            f"Tried to find a checkpoint in {project.project_dir} but there is none"
        )
    return found[-1]


def write_model(
    accelerator: Accelerator,
    model: nn.Module,
    directory: str,
    max_shard_size: int | str,
    safe: bool,
) -> None:
    """Write a model's weights, in files of a limited size; all processes call this.

    Args:
        accelerator: that has prepared the model.
        model: the model.
        directory: where to.
        max_shard_size: of a file, such as ``"10GB"``.
        safe: as safetensors; otherwise by torch.save.
    """
    if os.path.isfile(directory):
        log.error("Provided path (%s) should be a directory, not a file", directory)
        return
    state = accelerator.get_state_dict(model)
    if accelerator.saves_here:
        os.makedirs(directory, exist_ok=True)
        state = _without_ties(state) if safe else state
        _write_parts(state, directory, convert_file_size_to_int(max_shard_size), safe)
    accelerator.wait_for_everyone()


def _without_ties(state: dict[str, Any]) -> dict[str, Any]:
    """A state with tied weights once, under the first of their names, as safetensors has it."""
    seen: set[Any] = set()
    kept = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel():
            place = value.untyped_storage().data_ptr(), value.data_ptr(), value.shape
            if place in seen:
                continue
            seen.add(place)
        kept[name] = value
    return kept


def _write_parts(
    state: dict[str, Any], directory: str, max_bytes: int, safe: bool
) -> None:
    name, index_name = (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        if safe
        else (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    )
    parts = _parts(state, max_bytes)
    stem, ending = os.path.splitext(name)
    names = [
        name
        if len(parts) == 1
        else f"{stem}-{number + 1:05}-of-{len(parts):05}{ending}"
        for number in range(len(parts))
    ]
    # Files of an earlier model, which had another number of parts, would be loaded with these.
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(ending)}")
    for file in os.listdir(directory):
        if pattern.fullmatch(file) and file not in names:
            os.remove(os.path.join(directory, file))
    for part, file in zip(parts, names, strict=True):
        path = os.path.join(directory, file)
        if safe:
            export_weights(part, path, share=True)
        else:
            torch.save(part, path)
    index_path = os.path.join(directory, index_name)
    if len(parts) == 1:
        if os.path.exists(index_path):
            os.remove(index_path)
        return
    where = {key: file for part, file in zip(parts, names, strict=True) for key in part}
    total = sum(_bytes_of(value) for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with open(index_path, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2, sort_keys=True)


def _bytes_of(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _parts(state: dict[str, Any], max_bytes: int) -> list[dict[str, Any]]:
    """Divide a state into parts of so many bytes; a tensor that is larger is one by itself."""
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in state.items():
        more = _bytes_of(value)
        if parts[-1] and size + more > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += more
    return parts


def load_state_dict(checkpoint_file: str, device_map: Any = None) -> dict[str, Any]:
    """Read weights from one file, safetensors or torch's.

    Args:
        checkpoint_file: the file.
        device_map: must be None: they are read to the CPU.
    """
    if str(checkpoint_file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(checkpoint_file)
    return torch.load(checkpoint_file, map_location="cpu", weights_only=True)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Any = None,
    offload_folder: Any = None,
    dtype: torch.dtype | None = None,
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
        model: the model.
        checkpoint: the file, the folder, or the JSON index of parts.
        device_map: None, or one device for all of the model.
        offload_folder: of a model that is spread; not looked at, as the three that follow.
        offload_state_dict: the same.
        offload_buffers: the same.
        offload_8bit_bnb: the same.
        dtype: to convert floating-point tensors to.
        keep_in_fp32_modules: names of modules that are not converted.
        strict: require all names of both.
        full_state_dict: accepted: each process reads all of it.
        broadcast_from_rank0: the same.

    Raises:
        NotImplementedError: to spread the model over devices.
        ValueError: if there are no weights.
    """
    devices = set(device_map.values()) if isinstance(device_map, dict) else set()
    if isinstance(device_map, str) or len(devices) > 1 or devices & {"disk"}:
        raise NotImplementedError(
            "load_checkpoint_in_model with a device_map spreads a model over devices, CPU and disk: load it into the "
            "model without, and spread it with loopwright.framework.Engine.dispatch_model"
        )
    state: dict[str, Any] = {}
    for file in _files_of(os.fspath(checkpoint)):
        state |= load_state_dict(file)
    if dtype is not None:
        kept = keep_in_fp32_modules or []
        for name, value in state.items():
            if value.is_floating_point() and not any(part in name for part in kept):
                state[name] = value.to(dtype)
    model.load_state_dict(state, strict=strict)
    if devices:
        model.to(torch.device(devices.pop()))


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Any = None,
    **options: Any,
) -> nn.Module:
    """Load weights into a model, as :func:`load_checkpoint_in_model`, and return it.

    Args:
        model: the model.
        checkpoint: the file, the folder, or the JSON index of parts.
        device_map: None, or one device for all of the model.
        **options: of :func:`load_checkpoint_in_model`, and those for a model that is spread, which are not looked at.

    Raises:
        NotImplementedError: to spread the model over devices.
    """
    names = ("dtype", "strict", "keep_in_fp32_modules")
    given = {name: options[name] for name in names if name in options}
    load_checkpoint_in_model(model, checkpoint, device_map, **given)
    return model


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
        names = sorted(set(json.load(file)["weight_map"].values()))
    return [os.path.join(os.path.dirname(path), name) for name in names]
