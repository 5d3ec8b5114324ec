"""Tensors in safetensors files: written in chunks, without a second copy in memory, and read by the library."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...strategies.tensor_shards import TensorShard

# The format's names of types, in the order in which the library writes tensors: larger alignment first.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# Types that the format lacks, by the numbers of which they consist; all others count as bytes. They are written in one
# more dimension, and the metadata names the type.
_NUMBERS_OF = {torch.complex128: torch.float64, torch.complex32: torch.float16}
_ORDER = {dtype: position for position, dtype in enumerate(_NAMES)}
# How many bytes to write at once.
_CHUNK = 4 * 2**20


def is_storable(value: Any) -> bool:
    """Whether ``value`` is a tensor that a file can hold, or a shard of one."""
    if isinstance(value, TensorShard):
        return True
    if not isinstance(value, Tensor) or is_lazy(value):
        return False
    # A wrapper, such as torchao's, has no memory of its own.
    has_memory = not is_traceable_wrapper_subclass(value) and not value.is_meta
    return has_memory and value.layout == torch.strided and not value.is_quantized


def is_usual(dtype: torch.dtype) -> bool:
    """Whether other programs know a type, such as torch.save itself; all others are bytes to them."""
    return dtype in _NAMES or dtype == torch.complex128


def printable(name: str) -> str:
    """``name`` without lone surrogates, which can neither be printed nor read by the library."""
    return name.encode(errors="backslashreplace").decode()


def is_name(name: Any) -> bool:
    """Whether a tensor in a file can have this name."""
    return isinstance(name, str) and name == printable(name) and name != "__metadata__"


class StagedTensors:
    """Tensors on their way to a file.

    Args:
        tensors: by name; of one that is sharded over ranks, the shard that this rank saves.
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
        self.shards: dict[str, Any] = {}
        name_of = {}
        for name, value in tensors.items():
            if isinstance(value, TensorShard):
                self.shards[name] = value.shape, value.offset
                value = value.tensor
            tensor = value.detach()
            if share and tensor.numel():
                first = name_of.setdefault(memory_of(tensor), name)
                if first != name:
                    self.aliases[name] = first
                    continue
            if tensor.dtype not in _NAMES:
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
                tensor = tensor.resolve_conj().resolve_neg().unsqueeze(-1)
                tensor = tensor.view(_NUMBERS_OF.get(tensor.dtype, torch.uint8))
            if copy:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            self.tensors[name] = tensor

    def chunks(self) -> Iterator[Any]:
        """The file's bytes, some at a time."""
        names = sorted(
            self.tensors,
            key=lambda name: (_ORDER[self.tensors[name].dtype], name),
        )
        # Accelerate reads no file whose metadata does not name the format.
        metadata = {"format": "pt"}
        # The words of the file's format, of which "pieces" are shards.
        for key, values in (
            ("aliases", self.aliases),
            ("dtypes", self.dtypes),
            ("pieces", self.shards),
        ):
            if values:
                metadata[key] = json.dumps(values)
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin = end
            end += tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": [*tensor.shape],
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield from _chunks_of(self.tensors[name])


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that are the same numbers in the same memory."""
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _chunks_of(tensor: Tensor) -> Iterator[Any]:
    tensor = tensor.to("cpu").contiguous().resolve_conj().resolve_neg()
    if tensor.numel():
        content = memory_view(tensor)
        for begin in range(0, len(content), _CHUNK):
            yield content[begin : begin + _CHUNK]


def memory_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host's memory, to read from, or to write to; it must not be empty."""
    length = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_char * length).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def device_of(map_location: Any) -> Any:
    """The device that ``map_location`` names, as torch.load takes it; what is in a file counts as on the CPU."""
    if isinstance(map_location, Mapping):
        return map_location.get("cpu", "cpu")
    if callable(map_location) and not isinstance(map_location, torch.device):
        storage: Any = map_location(torch.empty(0).untyped_storage(), "cpu")
        return "cpu" if storage is None else storage.device
    return "cpu" if map_location is None else map_location


def read_tensors(content: bytes, map_location: Any) -> dict[str, Any]:
    """The tensors of a safetensors file, no shards, on ``map_location`` (default: the CPU).

    Raises:
        ValueError: if it is damaged, or was made to harm.
    """
    from safetensors.torch import load

    with naming_damage():
        loaded = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    device = device_of(map_location)
    tensors: dict[str, Any] = {
        name: tensor.to(device) for name, tensor in loaded.items()
    }
    with naming_damage():
        dtypes, aliases = (
            json.loads(metadata.get(key, "{}")) for key in ("dtypes", "aliases")
        )
        for name, dtype in dtypes.items():
            tensors[name] = tensors[name].view(getattr(torch, dtype)).squeeze(-1)
        for alias, name in aliases.items():
            tensors[alias] = tensors[name]
    return tensors


@contextmanager
def naming_damage() -> Iterator[None]:
    """Turn whatever the block raises into a ValueError, as content that is not ours may raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"its tensors cannot be read ({type(error).__name__}: {error})"
        ) from error
