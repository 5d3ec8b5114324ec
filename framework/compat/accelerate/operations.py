"""Accelerate's functions for tensors in containers, and its collectives: those of the Engine, for all processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import update_wrapper, wraps
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ...data.batches import leaves, map_tensors, rebuild
from ...data.device_input import move_batch
from ...engine import tensor_collectives
from ...engine.engine import Engine
from .options import TensorInformation
from .state import PartialState


class DistributedOperationException(Exception):
    """In debug mode: the processes have given different things to a collective."""


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor has been left as it is, where others are padded."""


def is_torch_tensor(tensor: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(tensor, Tensor)


def is_namedtuple(data: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def is_tensor_information(tensor_info: Any) -> bool:
    """Whether it is a :class:`TensorInformation`."""
    return isinstance(tensor_info, TensorInformation)


def honor_type(obj: Any, generator: Any) -> Any:
    """Make a container of ``obj``'s type from its new values."""
    if is_namedtuple(obj):
        return type(obj)(*list(generator))
    return type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Copy containers, with a function applied to what is in them.

    Args:
        func: takes such a value first.
        data: the containers.
        *args: further arguments of ``func``.
        test_type: to which values it is applied.
        error_on_other_type: refuse others; otherwise they stay.
        **kwargs: further arguments of ``func``.

    Raises:
        TypeError: for others.
    """

    def apply(value: Any) -> Any:
        if test_type(value):
            return func(value, *args, **kwargs)
        if isinstance(value, (tuple, list, Mapping)):
            return rebuild(value, apply)
        if error_on_other_type:
            raise TypeError(
                f"Unsupported types ({type(value)}) passed to `{func.__name__}`. Only nested list/tuple/dicts of "
                f"objects that are valid for `{test_type.__name__}` should be passed."
            )
        return value

    return apply(data)


def send_to_device(
    tensor: Any,
    device: Any,
    non_blocking: bool = False,
    skip_keys: str | list[str] | None = None,
) -> Any:
    """Move tensors in containers to a device.

    Args:
        tensor: a tensor, a container, or anything with ``to``.
        device: where to.
        non_blocking: do not wait until they are there.
        skip_keys: keys of a dict whose values stay.
    """
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or []
    if skipped and isinstance(tensor, Mapping):
        moved = {
            key: value if key in skipped else send_to_device(value, device)
            for key, value in tensor.items()
        }
        return type(tensor)(moved)  # type: ignore[call-arg] # mappings take one
    if not isinstance(tensor, Tensor) and hasattr(tensor, "to"):
        with suppress(TypeError):
            return tensor.to(device, non_blocking=non_blocking)
        return tensor.to(device)
    return move_batch(tensor, torch.device(device))


def get_data_structure(data: Any) -> Any:
    """The same containers, with what must be known of each tensor to make room for it."""
    return map_tensors(
        data, lambda tensor: TensorInformation(tensor.shape, tensor.dtype)
    )


def get_shape(data: Any) -> Any:
    """The same containers, with the shape of each tensor as a list."""
    return map_tensors(data, lambda tensor: list(tensor.shape))


def initialize_tensors(data_structure: Any) -> Any:
    """Empty tensors for what :func:`get_data_structure` returned."""

    def make(information: TensorInformation) -> Tensor:
        return torch.empty(*information.shape, dtype=information.dtype)

    return recursively_apply(make, data_structure, test_type=is_tensor_information)


def find_batch_size(data: Any) -> int | None:
    """The first dimension of the first tensor in containers; None if they are empty.

    Raises:
        TypeError: if the first of their values is no tensor.
    """
    if isinstance(data, (tuple, list, Mapping)) and len(data) == 0:
        raise ValueError(f"Cannot find the batch size from empty {type(data)}.")
    for leaf in leaves(data):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Can only find the batch size of tensors but got {type(leaf)}."
            )
        return leaf.shape[0]
    return None


def ignorant_find_batch_size(data: Any) -> int | None:
    """As :func:`find_batch_size`; None for what has none."""
    with suppress(TypeError, ValueError, IndexError):
        return find_batch_size(data)
    return None


def listify(data: Any) -> Any:
    """Tensors in containers, as lists of numbers."""

    def numbers(tensor: Tensor) -> Any:
        tensor = tensor.detach().cpu()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        return (tensor.float() if is_bfloat16 else tensor).tolist()

    return map_tensors(data, numbers)


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor in containers, if there is one."""
    found = (leaf.device for leaf in leaves(data) if isinstance(leaf, Tensor))
    return next(found, None)


def slice_tensors(
    data: Any,
    tensor_slice: slice,
    process_index: int | None = None,
    num_processes: int | None = None,
) -> Any:
    """Take a slice of each tensor in containers.

    Args:
        data: the tensors.
        tensor_slice: which rows.
        process_index: not looked at; functions of users' own take it.
        num_processes: the same.
    """
    return map_tensors(data, lambda tensor: tensor[tensor_slice])


def concatenate(data: list[Any], dim: int = 0) -> Any:
    """Concatenate the tensors of several containers that are built alike; a single one is returned as it is.

    Raises:
        TypeError: for what is neither a tensor nor a container.
    """
    return data[0] if len(data) == 1 else concatenate_tensors(data, dim)


def concatenate_tensors(data: list[Any], dim: int = 0) -> Any:
    """Concatenate the tensors of containers that are built alike, of which there may be only one.

    Raises:
        TypeError: for what is neither a tensor nor a container.
    """
    first = data[0]
    if isinstance(first, (tuple, list)):
        columns = zip(*data, strict=True)
        return honor_type(
            first, (concatenate_tensors(list(item), dim) for item in columns)
        )
    if isinstance(first, Mapping):
        # Mappings such as tokenizers' batches take a dict.
        kind: Any = type(first)
        return kind(
            {
                key: concatenate_tensors([item[key] for item in data], dim)
                for key in first
            }
        )
    if not isinstance(first, Tensor):
        raise TypeError(f"Can only concatenate tensors but got {type(first)}")
    return torch.cat(data, dim=dim)


def convert_to_fp32(tensor: Any) -> Any:
    """Tensors of half precision in containers, as float32."""

    def convert(value: Tensor) -> Tensor:
        is_half = value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_half else value

    return map_tensors(tensor, convert)


class ConvertOutputsToFp32:
    """Calls a function, and returns float32 where it gives half precision.

    Args:
        model_forward: the function.
    """

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return convert_to_fp32(self.model_forward(*args, **kwargs))

    def __getstate__(self) -> Any:
        raise pickle.PicklingError(
            "Cannot pickle a prepared model with automatic mixed precision, please unwrap the model with "
            "`Accelerator.unwrap_model(model)` before pickling it."
        )


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to return float32 where it gives half precision."""
    converted = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return converted(*args, **kwargs)

    forward.__wrapped__ = model_forward  # type: ignore[attr-defined] # as wraps() does
    return forward


# Collectives -------------------------------------------------------------------------------------------------------


def _engine() -> Engine:
    return PartialState().engine


def _verified(
    describe: Callable[[Any], Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a collective: in debug mode, compare what the processes give before it is called."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            state = PartialState()
            if state.debug and state.num_processes > 1:
                by_rank = state.engine.gather_object(describe(tensor))  # collective
                if any(shape != by_rank[0] for shape in by_rank):
                    lines = [f"- Process {i}: {one}" for i, one in enumerate(by_rank)]
                    raise DistributedOperationException(
                        "Cannot apply desired operation due to shape mismatches. All shapes across devices must be "
                        f"valid.\n\nOperation: `accelerate.utils.operations.{function.__name__}`\nInput shapes:\n  "
                        + "\n  ".join(lines)
                    )
            return function(tensor, *args, **kwargs)

        return call

    return decorate


def _dimensions(data: Any) -> Any:
    return map_tensors(data, lambda tensor: tensor.dim())


@_verified(get_shape)
def gather(tensor: Any) -> Any:
    """Gather tensors in containers from all processes, concatenated along the first dimension.

    Raises:
        TypeError: for anything else.
    """
    if PartialState().num_processes == 1:
        return tensor
    return _engine().gather(tensor)


def gather_object(object: Any) -> Any:
    """Join the lists of all processes: anything that can be pickled."""
    if PartialState().num_processes == 1:
        return object
    by_rank = _engine().gather_object(object)
    return [item for items in by_rank for item in items]


@_verified(get_shape)
def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Overwrite tensors in containers with those of one process, and return them."""
    if PartialState().num_processes == 1:
        return tensor
    received = _engine().broadcast(tensor, from_process)
    values = iter(
        [
            leaf.to(PartialState().device)
            for leaf in leaves(received)
            if isinstance(leaf, Tensor)
        ]
    )
    return map_tensors(tensor, lambda own: own.detach().copy_(next(values)))


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite a list's items with those of one process, and return it."""
    if PartialState().num_processes > 1:
        object_list[:] = _engine().broadcast(object_list, from_process)
    return object_list


@_verified(get_shape)
def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Reduce tensors in containers over all processes.

    Args:
        tensor: of the same shapes in all processes.
        reduction: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or ``"none"``.
        scale: what to multiply the result with.
    """
    if PartialState().num_processes == 1 and reduction in ("none", "mean", "sum"):
        return map_tensors(tensor, lambda own: own.clone() * scale)
    return _engine().reduce(tensor, reduction, scale)


@_verified(_dimensions)
def pad_across_processes(
    tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
) -> Any:
    """Pad tensors in containers along a dimension to the largest size of all processes.

    Args:
        tensor: the tensors.
        dim: the dimension.
        pad_index: the value to pad with.
        pad_first: pad at the beginning.

    Returns:
        The padded tensors. Nested tensors, and those that have no such dimension, stay as they are.

    Raises:
        TypeError: for what is neither a tensor nor a container.
    """

    def pad(own: Tensor) -> Tensor:
        if own.is_nested:
            warn(
                "A nested tensor cannot be padded without its unprocessed sizes, and stays as it is",
                CannotPadNestedTensorWarning,
                stacklevel=2,
            )
            return own
        if not -own.dim() <= dim < own.dim():
            return own
        return _engine().pad_across_processes(own, dim, pad_index, pad_first)

    return recursively_apply(pad, tensor, error_on_other_type=True)


def pad_input_tensors(
    tensor: Any, batch_size: int, num_processes: int, dim: int = 0
) -> Any:
    """Repeat the last row of tensors in containers, until the processes can divide them.

    Args:
        tensor: the tensors.
        batch_size: rows of a batch.
        num_processes: by how many.
        dim: which dimension the rows are.
    """
    missing = -batch_size % num_processes

    def pad(own: Tensor) -> Tensor:
        if not missing or own.shape[dim] != batch_size:
            return own
        last = own.narrow(dim, own.shape[dim] - 1, 1)
        return torch.cat([own, *[last] * missing], dim)

    return map_tensors(tensor, pad)


def copy_tensor_to_devices(tensor: Tensor | None = None) -> Tensor:
    """Give the tensor that one process has to all of them."""
    if PartialState().num_processes == 1:
        assert tensor is not None
        return tensor
    by_rank = _engine().gather_object(tensor)
    return next(item for item in by_rank if item is not None)


def gather_uneven(data: Any) -> Any:
    """Gather tensors in containers whose first dimensions may differ between the processes."""
    strategy = _engine().strategy
    if PartialState().num_processes == 1:
        return data

    def join(value: Any) -> Any:
        return tensor_collectives.concatenate_uneven(
            strategy, tensor_collectives.as_tensor(value), True
        )

    return tensor_collectives.map_values(data, join, "gather_for_metrics")


def holds_only_tensors(data: Any) -> bool:
    """Whether all that containers hold are tensors."""
    return all(isinstance(leaf, Tensor) for leaf in leaves(data))
