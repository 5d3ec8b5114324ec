"""Nested values in two files, ``NAME.json`` and ``NAME.safetensors``: what a run leaves of a batch or of generators.

The JSON is that of checkpoints, see :mod:`..checkpoint.serialization`. Nothing is pickled: of what is neither a tensor
nor plain, the text that describes it is kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..checkpoint.serialization import State, decode, encode
from ..checkpoint.storage import is_local, storage_of, write_file
from ..checkpoint.tensors import StagedTensors, read_tensors

# Characters of a text that describes an object.
_LONGEST_TEXT = 1000


def write_packed(path: str, value: State, most_bytes: int) -> None:
    """Write a value to ``path`` and the endings of the two files.

    Args:
        path: without an ending, local or any fsspec URL.
        value: by name, nested.
        most_bytes: how large the tensors, and the JSON, may be. Tensors beyond that, the later ones, are left out:
            ``"left_out"`` in the JSON names them with their types and shapes.

    Raises:
        OSError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    objects: State = {}
    encoded = {
        name: encode(plain(item), name, tensors, objects)
        for name, item in value.items()
    }
    kept = dict(_up_to(tensors, most_bytes))
    left_out = {
        name: f"{tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in kept
    }
    described = {name: _describe(each) for name, each in objects.items()}
    document = {**encoded, "left_out": left_out, "objects": described}
    text = json.dumps(document, default=_describe)
    if len(text) > most_bytes:
        # Only a batch can be so large.
        left_out["batch"] = f"{len(text)} characters"
        text = json.dumps({**document, "batch": None}, default=_describe)
    content = b"".join(map(bytes, StagedTensors(kept, copy=False).chunks()))
    _write(f"{path}.safetensors", content)
    _write(f"{path}.json", text.encode())


def read_packed(path: str) -> State:
    """Read what :func:`write_packed` has written; what was left out is None, and an object its description.

    Raises:
        OSError: if a file is missing.
        ValueError: if one is damaged.
    """
    storage = storage_of(path)
    document = json.loads(storage.read(f"{path}.json"))
    tensors: dict[str, Any] = read_tensors(storage.read(f"{path}.safetensors"), None)
    tensors |= dict.fromkeys(document.pop("left_out"))
    return decode(document, tensors, document.pop("objects"))


def plain(value: Any) -> Any:
    """Return a value with the objects that batches are often made of as dicts: dataclasses, named tuples, mappings."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    as_dict = getattr(value, "_asdict", None)
    if isinstance(value, tuple) and as_dict is not None:
        return plain(as_dict())
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    return value


def _up_to(
    tensors: Mapping[str, Tensor], most_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """Give the first tensors that need no more bytes together."""
    size = 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size <= most_bytes:
            yield name, tensor


def _describe(value: Any) -> str:
    # An object of a user's may fail at that.
    try:
        text = reprlib.repr(value)
    except Exception as error:
        text = f"its repr raised {type(error).__name__}"
    return f"{type(value).__name__}: {text[:_LONGEST_TEXT]}"


def _write(path: str, content: bytes) -> None:
    """Write a file that appears all at once; not flushed to the disk, as no training depends on it."""
    if not is_local(path):
        write_file(path, content)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as file:
        file.write(content)
    os.replace(f"{path}.part", path)
