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
        if size.upper().endswith(unit) and re.fullmatch(r"[\d.]+", number):
            # A small b is for bits.
            bits = 8 if size.endswith("b") and "I" not in unit else 1
            return int(float(number) * factor) // bits
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
