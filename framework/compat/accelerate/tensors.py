"""A module's parameters and buffers by their names: how large they are, which of them are one, and moving them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .options import CustomDtype

# Bytes of one number of types that torch has no name for.
_CUSTOM_BYTES: dict[Any, float] = {
    CustomDtype.INT2: 1 / 4,
    CustomDtype.INT4: 1 / 2,
    CustomDtype.FP8: 1,
}
# Where tied weights are, by the address of the weight and the device.
TiedWeights = dict[int, dict[Any, Tensor]]


def named_module_tensors(
    module: nn.Module,
    include_buffers: bool = True,
    recurse: bool = False,
    remove_non_persistent: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module: parameters, and buffers if they are included.

    Args:
        module: the module.
        include_buffers: give buffers, too.
        recurse: give those of the module's parts, too.
        remove_non_persistent: leave out buffers that a state does not have.
    """
    yield from module.named_parameters(recurse=recurse)
    if not include_buffers:
        return
    left_out = get_non_persistent_buffers(module, recurse, fqns=True)
    for name, buffer in module.named_buffers(recurse=recurse):
        if not (remove_non_persistent and name in left_out):
            yield name, buffer


def get_non_persistent_buffers(
    module: nn.Module, recurse: bool = False, fqns: bool = False
) -> set[str]:
    """The names of buffers that a module's state does not have.

    Args:
        module: the module.
        recurse: those of its parts, too.
        fqns: by their full names.
    """
    found: set[str] = set()
    for name, part in module.named_modules() if recurse else [("", module)]:
        prefix = f"{name}." if fqns and name else ""
        found |= {f"{prefix}{buffer}" for buffer in part._non_persistent_buffers_set}
    return found


def dtype_byte_size(dtype: Any) -> float:
    """Bytes of one number of this type.

    Raises:
        ValueError: for what is no type.
    """
    if dtype in _CUSTOM_BYTES:
        return _CUSTOM_BYTES[dtype]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` is not a valid dtype: {dtype}.")
    return 1 / 8 if dtype == torch.bool else dtype.itemsize


def as_dtype(dtype: Any) -> Any:
    """A type, which may be named, such as ``"torch.float16"`` or ``"float16"``."""
    if isinstance(dtype, str):
        return getattr(torch, dtype.removeprefix("torch."))
    return dtype


def is_whole_number(dtype: torch.dtype) -> bool:
    """Whether a type has no fractions, so that it stays as it is where others are converted."""
    return re.match(r"torch\.(u?int|bool)", str(dtype)) is not None


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors have the same memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def owner_of(module: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    """The part of a module that has a tensor, and its name there.

    Raises:
        ValueError: if there is none.
    """
    parent, _, name = tensor_name.rpartition(".")
    part: Any = module
    for step in parent.split(".") if parent else []:
        part = getattr(part, step, None)
        if part is None:
            raise ValueError(f"{module} has no attribute {step}.")
    if name not in _tensors_of(part, "parameters") | _tensors_of(part, "buffers"):
        raise ValueError(f"{part} does not have a parameter or a buffer named {name}.")
    return part, name


def _tensors_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """Torch's own table of a module's ``"parameters"`` or ``"buffers"``, which may be written."""
    return vars(module)[f"_{kind}"]


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Groups of names under which a model has the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: list[list[str]]) -> None:
    """Let parameters be one again, that of the group which has values."""
    for group in tied_params:
        owners = [owner_of(model, name) for name in group]
        values = [getattr(part, name) for part, name in owners]
        real = [value for value in values if value.device.type != "meta"]
        for part, name in owners if real else ():
            setattr(part, name, real[0])


def compute_module_sizes(
    model: nn.Module,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of a model's tensors, by the names of its parts; all of it is ``""``.

    Args:
        model: the model.
        dtype: in which floating-point tensors would be, if they are not smaller.
        special_dtypes: in which type some would be, by name.
        buffers_only: only those of buffers.
    """
    special = {name: as_dtype(kind) for name, kind in (special_dtypes or {}).items()}
    tensors = model.named_buffers()
    if not buffers_only:
        tensors = named_module_tensors(model, recurse=True)
    # Tied parameters are counted once: under their other names there is nothing.
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors:
        number = dtype_byte_size(tensor.dtype)
        if name in special:
            number = dtype_byte_size(special[name])
        elif dtype is not None and not is_whole_number(tensor.dtype):
            number = min(number, dtype_byte_size(as_dtype(dtype)))
        size = tensor.numel() * number
        parts = name.split(".")
        for end in range(len(parts) + 1):
            prefix = ".".join(parts[:end])
            sizes[prefix] += size  # type: ignore[assignment] # fractions only for bools
    return sizes


def compute_module_total_buffer_size(
    model: nn.Module,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
) -> int:
    """Bytes of a model's buffers; see :func:`compute_module_sizes`."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True)[""]


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Any,
    value: Any = None,
    dtype: Any = None,
    fp16_statistics: Any = None,
    tied_params_map: TiedWeights | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Put a parameter or a buffer on a device, or another value in its place.

    Args:
        module: has it, or one of its parts.
        tensor_name: its name.
        device: where to; ``"meta"`` gives its memory back.
        value: what to put there (default: its own value).
        dtype: in which type, unless it has whole numbers (default: the one it has).
        fp16_statistics: of quantized weights, which are not served.
        tied_params_map: where tied weights are already, so that they are moved once.
        non_blocking: do not wait until it is there.
        clear_cache: accepted: torch gives its cached memory out again by itself.

    Raises:
        ValueError: if there is no such tensor, or no value for it, or one of another shape.
        NotImplementedError: for quantized weights.
    """
    if fp16_statistics is not None:
        raise NotImplementedError(
            "set_module_tensor_to_device: fp16_statistics is not served, as quantized weights are not"
        )
    owner, name = owner_of(module, tensor_name)
    old = getattr(owner, name)
    pointers = [tensor.data_ptr() for tensor in (value, old) if _is_real(tensor)]
    tied = [] if tied_params_map is None else [tied_params_map.get(p) for p in pointers]
    for places in tied:
        if places is not None and device in places:
            _tensors_of(owner, "parameters")[name] = places[device]
            return
    leaves_meta = old.device.type == "meta" and torch.device(device).type != "meta"
    if leaves_meta and value is None:
        raise ValueError(
            f"{name} is on the meta device, we need a `value` to put in on {device}."
        )
    with torch.no_grad():
        new = _converted(owner, name, value, device, dtype, non_blocking)
        _put(owner, name, new)
    for places in tied:
        if places is not None:
            places.setdefault(device, getattr(owner, name))
            return


def _is_real(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type != "meta"


def _converted(
    owner: nn.Module, name: str, value: Any, device: Any, dtype: Any, non_blocking: bool
) -> Tensor:
    """The value that a tensor is to have."""
    old = getattr(owner, name)
    if value is None:
        # A value that is only moved keeps its type, unless there is no value.
        is_away = torch.device(device).type == "meta"
        changes = is_away and dtype is not None and not is_whole_number(old.dtype)
        value = old.detach()
        dtype = as_dtype(dtype) if changes else old.dtype
    else:
        value = torch.as_tensor(value)
        dtype = old.dtype if dtype is None else as_dtype(dtype)
        if old.shape != value.shape:
            raise ValueError(
                f'Trying to set a tensor of shape {value.shape} in "{name}" (which has shape {old.shape}), this looks '
                "incorrect."
            )
        if dtype != old.dtype and is_whole_number(value.dtype):
            dtype = value.dtype
    return value.detach().to(device, dtype, non_blocking=non_blocking)


def _put(owner: nn.Module, name: str, new: Tensor) -> None:
    buffers = _tensors_of(owner, "buffers")
    if name in buffers:
        buffers[name] = new
        return
    old = _tensors_of(owner, "parameters")[name]
    if old.device == new.device and old.data_ptr() == new.data_ptr() and _is_real(old):
        return
    parameter = type(old)(new, requires_grad=old.requires_grad)
    # What others have written on it: marks, and no memory.
    vars(parameter).update(vars(old))
    _tensors_of(owner, "parameters")[name] = parameter
