"""Weights that are kept outside of a model: in a dict, or in files of a folder, from which they are read one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

# The file that tells the types and shapes of those in a folder.
_INDEX = "index.json"


def _carrier_of(dtype: torch.dtype) -> torch.dtype:
    """The type, of as many bytes, in which NumPy can hold a weight."""
    if dtype == torch.bfloat16:
        return torch.int16
    if str(dtype).startswith("torch.float8"):
        return torch.int8
    return dtype


def offload_weight(
    weight: Tensor,
    weight_name: str,
    offload_folder: str | os.PathLike[str],
    index: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write a weight to the file ``NAME.dat`` of a folder.

    Args:
        weight: the weight.
        weight_name: its name.
        offload_folder: the folder.
        index: where its type and shape are noted.

    Returns:
        The index.
    """
    name = str(weight.dtype).removeprefix("torch.")
    weight = weight.detach().cpu().contiguous()
    array = weight.view(_carrier_of(weight.dtype)).numpy()
    if index is not None:
        index[weight_name] = {"dtype": name, "shape": list(array.shape)}
    array.tofile(os.path.join(offload_folder, f"{weight_name}.dat"))
    return index


def load_offloaded_weight(
    weight_file: str | os.PathLike[str], weight_info: Mapping[str, Any]
) -> Tensor:
    """Read a weight that :func:`offload_weight` wrote.

    Args:
        weight_file: its file.
        weight_info: what the index says of it.
    """
    dtype = getattr(torch, weight_info["dtype"])
    carrier = str(_carrier_of(dtype)).removeprefix("torch.")
    array = numpy.fromfile(weight_file, dtype=carrier)
    return torch.from_numpy(array.reshape(weight_info["shape"])).view(dtype)


def save_offload_index(
    index: Mapping[str, Any] | None, offload_folder: str | os.PathLike[str]
) -> None:
    """Add an index to that of a folder."""
    if not index:
        return
    path = os.path.join(offload_folder, _INDEX)
    whole = _index_of(offload_folder) if os.path.isfile(path) else {}
    whole.update(index)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(whole, file, indent=2)


def _index_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    with open(os.path.join(folder, _INDEX), encoding="utf-8") as file:
        return json.load(file)


def holds_offloaded(folder: str | os.PathLike[str]) -> bool:
    """Whether weights have been written to a folder."""
    return os.path.isfile(os.path.join(folder, _INDEX))


def offload_state_dict(
    save_dir: str | os.PathLike[str], state_dict: Mapping[str, Tensor]
) -> None:
    """Write all weights of a state to a folder, with an index.

    Args:
        save_dir: the folder.
        state_dict: the state.
    """
    os.makedirs(save_dir, exist_ok=True)
    index: dict[str, Any] = {}
    for name, weight in state_dict.items():
        offload_weight(weight, name, save_dir, index)
    save_offload_index(index, save_dir)


def extract_submodules_state_dict(
    state_dict: Mapping[str, Tensor], submodule_names: list[str]
) -> dict[str, Tensor]:
    """The part of a state that belongs to some modules, or is named by itself."""
    return {
        key: value
        for name in submodule_names
        for key, value in state_dict.items()
        if f"{key}.".startswith(f"{name}.")
    }


class PrefixedDataset(Mapping[str, Any]):
    """A mapping's values, by names without their beginning.

    Args:
        dataset: the mapping.
        prefix: the beginning of its names.
    """

    def __init__(self, dataset: Mapping[str, Any], prefix: str) -> None:
        self.dataset = dataset
        self.prefix = prefix

    def __getitem__(self, key: str) -> Any:
        return self.dataset[f"{self.prefix}{key}"]

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in self.dataset if key.startswith(self.prefix)])

    def __len__(self) -> int:
        return len(self.dataset)


class OffloadedWeightsLoader(Mapping[str, Tensor]):
    """Weights by their names: from a state, or else read from a file each time that they are asked for.

    Args:
        state_dict: the state.
        save_folder: where :func:`offload_state_dict` wrote them.
        index: what is in which file: the folder's own, or ``{name: {"safetensors_file": …, "weight_name": …}}``.
        device: where those of safetensors files are read to (default: the CPU).

    Raises:
        ValueError: if nothing is given.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Tensor] | None = None,
        save_folder: str | os.PathLike[str] | None = None,
        index: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise ValueError(
                "Need either a `state_dict`, a `save_folder` or an `index` containing offloaded weights."
            )
        if index is None:
            index = {} if save_folder is None else _index_of(save_folder)
        self.state_dict = state_dict or {}
        self.save_folder = save_folder
        self.index = index
        self.device = device
        self.all_keys = list(dict.fromkeys([*self.state_dict, *index]))

    def __getitem__(self, key: str) -> Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        information = self.index[key]
        if information.get("safetensors_file") is not None:
            return self._read(key, information)
        path = os.path.join(self.save_folder or "", f"{key}.dat")
        return load_offloaded_weight(path, information)

    def _read(self, key: str, information: Mapping[str, Any]) -> Tensor:
        """Read a weight from a safetensors file."""
        with safe_open(information["safetensors_file"], framework="pt") as file:
            tensor = file.get_tensor(information.get("weight_name", key))
        if "dtype" in information:
            tensor = tensor.to(getattr(torch, information["dtype"]))
        return tensor.to(self.device or "cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)
