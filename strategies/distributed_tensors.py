"""torch's distributed tensors: their shards, and tensors distributed as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .stored_tensors import StoredTensor
from .tensor_shards import TensorShard


def shard_of(tensor: DTensor) -> TensorShard:
    """Return what this process has of a distributed tensor.

    Raises:
        TypeError: if its local tensor is of a subclass with a format of its own, such as a quantized one.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this process is part of the mesh"
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, mesh, tensor.placements
    )
    # Of the processes that have the same shard, the first one saves it. They may be replicas in this mesh, or be in
    # other meshes beside it, of which the first one has rank 0.
    is_first = int(mesh.mesh.min()) == 0
    for index, placement in zip(coordinate, tensor.placements, strict=True):
        is_first &= index == 0 or not isinstance(placement, Replicate)
    detached: Any = tensor.detach()
    local = detached.to_local()
    if is_traceable_wrapper_subclass(local):
        raise TypeError(
            f"{type(local).__name__}, of which a distributed tensor is made, cannot be saved in pieces"
        )
    return TensorShard(
        local, tuple(tensor.shape), tuple(offset), is_first and local.numel() > 0
    )


def to_shards(state: Any) -> Any:
    """Return nested state with a :class:`TensorShard` for each distributed tensor."""
    if isinstance(state, dict):
        return {key: to_shards(value) for key, value in state.items()}
    if isinstance(state, list):
        return [to_shards(value) for value in state]
    return shard_of(state) if isinstance(state, DTensor) else state


def distribute(whole: Tensor | StoredTensor, like: DTensor) -> DTensor:
    """Distribute ``whole``, which all processes have or can read, as ``like`` is."""
    shard = shard_of(like)
    local = torch.empty_like(shard.tensor, memory_format=torch.contiguous_format)
    replace(shard, tensor=local).load(whole)
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def full_tensor(value: Any) -> Any:
    """Return all numbers of a distributed tensor, in each process; anything else as it is. A collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a distributed tensor, or all of another one; a view."""
    data: Any = tensor.detach()
    return data.to_local() if isinstance(tensor, DTensor) else data
