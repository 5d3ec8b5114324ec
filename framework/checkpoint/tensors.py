"""Tensors in safetensors files: written piece by piece, without a second copy in memory, and read by the library."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...strategies.tensor_shards import TensorShard

# In the order in which the library writes them: what needs more alignment comes first.
_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# What the format lacks is written as numbers that it has, or bytes, in one more dimension; the metadata names the type.
_PARTS = {torch.complex128: torch.float64, torch.complex32: torch.float16}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
_PIECE = 4 * 2**20  # bytes that are written at once


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor that a file can hold, or a part of one."""
    return isinstance(value, TensorShard) or (
        isinstance(value, Tensor)
        and not is_lazy(value)
        and not is_traceable_wrapper_subclass(
            value
        )  # such as torchao's: it has no memory of its own
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def printable(name: str) -> str:
    """``name`` without lone surrogates, which can neither be printed nor read by the library."""
    return name.encode(errors="backslashreplace").decode()


def is_name(name: Any) -> bool:
    """Whether a tensor in a file can have this name."""
    return isinstance(name, str) and name == printable(name) and name != "__metadata__"


class StagedTensors:
    """Tensors on their way to a file.

    Args:
        tensors: by name; of one that is spread over processes, the part that this process saves.
        copy: take copies in the host's memory now.
        share: store a tensor that has several names once, and the other names in the metadata.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | TensorShard],
        copy: bool,
        share: bool = True,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.pieces: dict[str, Any] = {}
        seen: dict[Any, str] = {}
        for name, value in tensors.items():
            if isinstance(value, TensorShard):
                self.pieces[name] = value.shape, value.offset
            tensor = (
                value.tensor if isinstance(value, TensorShard) else value
            ).detach()
            bits = tensor.is_conj(), tensor.is_neg()
            place = (
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                tensor.device,
                *bits,
            )
            if share and tensor.numel() and place in seen:
                self.aliases[name] = seen[place]
                continue
            seen[place] = name
            if tensor.dtype not in _NAMES:
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
                tensor = tensor.resolve_conj().resolve_neg().unsqueeze(-1)
                tensor = tensor.view(_PARTS.get(tensor.dtype, torch.uint8))
            if copy:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            self.tensors[name] = tensor

    def write(self, file: Any) -> None:
        """Write to what has a method ``write``."""
        names = sorted(
            self.tensors, key=lambda name: (_ORDER[self.tensors[name].dtype], name)
        )
        # Accelerate reads no file whose metadata does not name the format.
        metadata = {"format": "pt"}
        metadata |= {
            key: json.dumps(own)
            for key in ("aliases", "dtypes", "pieces")
            if (own := getattr(self, key))
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": [*tensor.shape],
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write_tensor(self.tensors[name], file)


def _write_tensor(tensor: Tensor, file: Any) -> None:
    tensor = tensor.to("cpu").contiguous().resolve_conj().resolve_neg()
    if not (length := tensor.numel() * tensor.element_size()):
        return
    content = memoryview((ctypes.c_char * length).from_address(tensor.data_ptr())).cast(
        "B"
    )
    for begin in range(0, length, _PIECE):
        file.write(content[begin : begin + _PIECE])


def device_of(map_location: Any) -> Any:
    """The device that ``map_location`` names, as torch.load takes it; what is in a file counts as on the CPU."""
    if isinstance(map_location, Mapping):
        return map_location.get("cpu", "cpu")
    if callable(map_location) and not isinstance(map_location, torch.device):
        storage: Any = map_location(torch.empty(0).untyped_storage(), "cpu")
        return "cpu" if storage is None else storage.device
    return "cpu" if map_location is None else map_location


def read_tensors(content: bytes, map_location: Any) -> dict[str, Any]:
    """The tensors of a safetensors file, or its pieces of them, on ``map_location`` (default: the CPU).

    Raises:
        ValueError: if it is damaged, or was made to harm.
    """
    from safetensors.torch import load

    with naming_damage():
        loaded = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    device = device_of(map_location)
    tensors: dict[str, Any] = {
        name: tensor.to(device) for name, tensor in loaded.items()
    }
    metadata = header.get("__metadata__", {})
    with naming_damage():
        for name, dtype in json.loads(metadata.get("dtypes", "{}")).items():
            tensors[name] = tensors[name].view(getattr(torch, dtype)).squeeze(-1)
        for alias, name in json.loads(metadata.get("aliases", "{}")).items():
            tensors[alias] = tensors[name]
        for name, (shape, offset) in json.loads(metadata.get("pieces", "{}")).items():
            tensors[name] = TensorShard(
                tensors[name],
                tuple(shape),
                offset if isinstance(offset, int) else tuple(offset),
            )
    return tensors


@contextmanager
def naming_damage() -> Iterator[None]:
    """Raise whatever content that is not as we write it makes others raise as a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"its tensors cannot be read ({type(error).__name__}: {error})"
        ) from error


def join_pieces(files: Iterable[dict[str, Any]], limit: int) -> dict[str, Tensor]:
    """The tensors of several files, those in pieces put together.

    Args:
        files: their tensors by name.
        limit: the bytes of all files; a tensor that is said to be larger is a lie.

    Raises:
        ValueError: if a part of one is missing, or does not fit, or a name is there twice.
    """
    found: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for tensors in files:
        for name, value in tensors.items():
            if name in found and not (
                isinstance(value, TensorShard) and name in missing
            ):
                raise ValueError(f"{name} is there twice")
            if not isinstance(value, TensorShard):
                found[name] = value
                continue
            piece = value.tensor
            with naming_damage():
                if name not in found:
                    if math.prod(value.shape) * piece.element_size() > limit:
                        raise ValueError(
                            f"{name} is said to have the shape {value.shape}, more than there is"
                        )
                    found[name] = torch.empty(
                        value.shape, dtype=piece.dtype, device=piece.device
                    )
                    missing[name] = found[name].numel()
                value.slice_of(found[name]).copy_(piece)
            missing[name] -= piece.numel()
        tensors.clear()  # before the next file is read
    if incomplete := [name for name, numbers in missing.items() if numbers]:
        raise ValueError(f"of {', '.join(incomplete)}, a part is missing")
    return found
