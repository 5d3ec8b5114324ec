"""Pieces of torch's distributed tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .tensor_shards import TensorShard


def shard_of(tensor: Any) -> TensorShard:
    """What this process has of a distributed tensor."""
    mesh, placements = tensor.device_mesh, tensor.placements
    place = mesh.get_coordinate()
    assert place is not None, "this process is part of the mesh"
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    # Of those that have the same, the first saves it: in this mesh, and among meshes beside it.
    first = all(
        at == 0
        for at, how in zip(place, placements, strict=True)
        if isinstance(how, Replicate)
    )
    first = first and int(mesh.mesh.min()) == 0
    local = tensor.detach().to_local()
    if is_traceable_wrapper_subclass(local):
        raise TypeError(
            f"{type(local).__name__}, of which a distributed tensor is made, cannot be saved in pieces"
        )
    return TensorShard(
        local, tuple(tensor.shape), tuple(offset), first and local.numel() > 0
    )


def to_shards(state: Any) -> Any:
    """Nested state with a :class:`TensorShard` for each distributed tensor."""
    if isinstance(state, dict):
        return {key: to_shards(value) for key, value in state.items()}
    if isinstance(state, list):
        return [to_shards(value) for value in state]
    return shard_of(state) if isinstance(state, DTensor) else state


def distribute(whole: Tensor, like: Any) -> DTensor:
    """``whole``, which all processes have, spread as ``like`` is."""
    own = shard_of(like)
    local = (
        own.slice_of(whole)
        .to(own.tensor.device, own.tensor.dtype, copy=True)
        .contiguous()
    )
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def full_tensor(value: Any) -> Any:
    """A distributed tensor's numbers, all of them, in each process. A collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value
