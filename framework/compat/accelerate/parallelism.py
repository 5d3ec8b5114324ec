"""Accelerate's description of how processes divide a model and its data among them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

from .options import is_true

# From the outermost dimension of the mesh of processes to the innermost.
_DIMENSIONS = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
_PREFIX = "PARALLELISM_CONFIG_"


def _from_environment(name: str, default: Any) -> Any:
    return os.environ.get(_PREFIX + name.upper(), default)


@dataclass
class TorchTensorParallelConfig:
    """How layers are divided among processes.

    Attributes:
        enable_async_tp: accepted, with a warning.
    """

    enable_async_tp: bool = False

    def __post_init__(self) -> None:
        if self.enable_async_tp:
            warnings.warn(
                "Async tensor parallelism is currently not supported, ignoring this option.",
                stacklevel=3,
            )


@dataclass
class TorchContextParallelConfig:
    """How sequences are divided among processes.

    Attributes:
        cp_comm_strategy: ``"allgather"`` or ``"alltoall"``.
    """

    cp_comm_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.cp_comm_strategy is None:
            self.cp_comm_strategy = _from_environment("cp_comm_strategy", "allgather")
        if self.cp_comm_strategy not in ("allgather", "alltoall"):
            raise ValueError(
                f"Invalid cp_comm_strategy: {self.cp_comm_strategy}. Must be one of 'allgather' or 'alltoall'."
            )


@dataclass
class DeepSpeedSequenceParallelConfig:
    """How DeepSpeed divides sequences among processes.

    Attributes:
        sp_seq_length: their length, if all have the same.
        sp_seq_length_is_variable: they have different lengths.
        sp_attn_implementation: of transformers: ``"sdpa"``, ``"flash_attention_2"``, ``"flash_attention_3"``, or a
            kernel of the hub.
    """

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool | None = None
    sp_attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.sp_seq_length_is_variable is None:
            word = _from_environment("sp_seq_length_is_variable", "true")
            self.sp_seq_length_is_variable = is_true(word)
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            length = _from_environment("sp_seq_length", None)
            if length is None:
                raise ValueError(
                    "when `sp_seq_length_is_variable` is `False` `sp_seq_length` must be provided either through the "
                    "constructor or the environment variable PARALLELISM_CONFIG_SP_SEQ_LENGTH"
                )
            self.sp_seq_length = None if length == "None" else int(length)
        if self.sp_attn_implementation is None:
            self.sp_attn_implementation = _from_environment(
                "sp_attn_implementation", None
            )
        name = self.sp_attn_implementation
        known = ("flash_attention_2", "flash_attention_3", "sdpa")
        is_kernel = "/" in (name or "") and "flash-attn" in (name or "")
        if name is not None and name not in known and not is_kernel:
            raise ValueError(
                f"Invalid sp_attn_implementation: {name}. Must be one of {list(known)} or a hub-hosted flash attention "
                "kernel (e.g. 'kernels-community/flash-attn2')."
            )


@dataclass(repr=False)
class ParallelismConfig:
    """How many processes divide what. An Accelerator here serves replicas and shards.

    Attributes:
        dp_replicate_size: how many have replicas of the model, or of its shards.
        dp_shard_size: over how many it is sharded.
        tp_size: by how many its layers are divided; not served by an Accelerator here.
        cp_size: by how many sequences are divided by torch; the same.
        cp_backend: must be ``"torch"``.
        sp_size: by how many sequences are divided by DeepSpeed; the same.
        sp_backend: must be ``"deepspeed"``.
        tp_handler, cp_handler, sp_handler: how.
        device_mesh: the mesh of processes, once it was asked for.

    Raises:
        ValueError: for sizes that do not go together.
    """

    dp_replicate_size: int = None  # type: ignore[assignment] # the environment's, else 1
    dp_shard_size: int = None  # type: ignore[assignment] # as above
    tp_size: int = None  # type: ignore[assignment] # as above
    cp_size: int = None  # type: ignore[assignment] # as above
    cp_backend: str | None = None
    sp_size: int = None  # type: ignore[assignment] # as above
    sp_backend: str | None = None
    tp_handler: TorchTensorParallelConfig | None = None
    cp_handler: TorchContextParallelConfig | None = None
    sp_handler: DeepSpeedSequenceParallelConfig | None = None

    device_mesh = None

    def __post_init__(self) -> None:
        for dimension in _DIMENSIONS:
            name = f"{dimension}_size"
            if getattr(self, name) is None:
                setattr(self, name, int(_from_environment(name, 1)))
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, but got {getattr(self, name)}"
                )
        self._check_backends()
        self._check_sizes()
        if self.tp_enabled and self.tp_handler is None:
            self.tp_handler = TorchTensorParallelConfig()
        if self.cp_enabled and self.cp_handler is None:
            self.cp_handler = TorchContextParallelConfig()
        if self.sp_enabled and self.sp_handler is None:
            self.sp_handler = DeepSpeedSequenceParallelConfig()

    def _check_backends(self) -> None:
        for name, known in (("cp_backend", "torch"), ("sp_backend", "deepspeed")):
            if getattr(self, name) is None:
                setattr(self, name, _from_environment(name, known))
            if getattr(self, name) != known:
                raise ValueError(
                    f"{name} must be one of {[known]}, but got {getattr(self, name)}"
                )
        handler = self.cp_handler
        if handler is not None and not isinstance(handler, TorchContextParallelConfig):
            raise ValueError(
                f"ParallelismConfig's cp_backend={self.cp_backend} requires {TorchContextParallelConfig}, but "
                f"cp_handler was set to {type(handler)}"
            )

    def _check_sizes(self) -> None:
        if self.cp_enabled and self.sp_enabled:
            raise ValueError(
                "Context Parallelism (CP) and Sequence Parallelism (SP) are mutually exclusive. Got "
                f"cp_size={self.cp_size} and sp_size={self.sp_size}. Please set either cp_size=1 or sp_size=1."
            )
        divides = self.tp_enabled or self.cp_enabled
        if divides and self.dp_replicate_enabled and not self.dp_shard_enabled:
            raise ValueError(
                "Tensor/Context parallelism (tp/cp_size > 1) cannot be used with pure data parallelism "
                "(dp_replicate_size > 1 and dp_shard_size == 1). Please set dp_shard_size > 1, too, or "
                "dp_replicate_size == 1."
            )

    def __repr__(self) -> str:
        values = [f"{name}={value}" for name, value in vars(self).items()]
        return f"ParallelismConfig({', '.join(values)}, total_size={self.total_size})"

    def _names(self, *dimensions: str) -> list[str]:
        """Those of these dimensions that have more than one process."""
        return [name for name in dimensions if self.size_of(name) > 1]

    def size_of(self, dimension: str) -> int:
        """The size of a dimension, such as ``"dp_shard"``."""
        return getattr(self, f"{dimension}_size")

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether there are replicas."""
        return self.dp_replicate_size > 1

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether the model is sharded."""
        return self.dp_shard_size > 1

    @property
    def tp_enabled(self) -> bool:
        """Whether layers are divided."""
        return self.tp_size > 1

    @property
    def cp_enabled(self) -> bool:
        """Whether torch divides sequences."""
        return self.cp_size > 1

    @property
    def sp_enabled(self) -> bool:
        """Whether DeepSpeed divides sequences."""
        return self.sp_size > 1

    @property
    def dp_dim_names(self) -> list[str]:
        """Dimensions whose processes have other batches."""
        return self._names("dp_replicate", "dp_shard")

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Dimensions whose processes have the same batches."""
        return self._names("tp", "cp", "sp")

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Dimensions over which the model is sharded."""
        return self._names("dp_shard", "cp")

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Dimensions over which losses are averaged."""
        return self._names("dp_replicate", "dp_shard", "cp")

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Dimensions of the mesh that FSDP is given."""
        return [*self._names("dp_replicate"), "dp_shard_cp"]

    @property
    def active_mesh_dims(self) -> list[str]:
        """All dimensions that have more than one process."""
        return self.dp_dim_names + self.non_dp_dim_names

    @property
    def total_size(self) -> int:
        """How many processes there are to be."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def non_data_parallel_size(self) -> int:
        """How many processes have the same batches."""
        return self.tp_size * self.cp_size * self.sp_size

    @property
    def data_parallel_size(self) -> int:
        """How many parts of the data there are."""
        return self.dp_replicate_size * self.dp_shard_size

    def _get_mesh(self) -> tuple[Any, ...]:
        """Names and sizes of the mesh's dimensions; nothing for one process."""
        names = self._names(*_DIMENSIONS)
        sizes = tuple(self.size_of(name) for name in names)
        return (tuple(names), sizes) if names else ()

    def build_device_mesh(self, device_type: str) -> Any:
        """The mesh of processes, with those that several dimensions make together; None for one process.

        Args:
            device_type: such as ``"cuda"``.
        """
        from torch.distributed.device_mesh import init_device_mesh

        mesh = self._get_mesh()
        # DeepSpeed makes its own groups.
        if self.sp_enabled or not mesh:
            return None
        names, sizes = mesh
        built: Any = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        for dimensions, joint in (
            (self.dp_dim_names, "dp"),
            (self.dp_shard_cp_dim_names, "dp_shard_cp"),
            (self.dp_cp_dim_names, "dp_cp"),
        ):
            if dimensions:
                built[dimensions]._flatten(joint)
        return built

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """The mesh of processes, which is built when it is asked for first.

        Args:
            device_type: such as ``"cuda"``.

        Raises:
            ValueError: without a type, before it is built; or for another type than that it was built for.
        """
        if self.device_mesh is None and device_type is None:
            raise ValueError(
                "You need to pass a device_type e.g cuda to build the device mesh"
            )
        if self.device_mesh is None:
            self.device_mesh = self.build_device_mesh(device_type or "")
        elif device_type not in (None, self.device_mesh.device_type):
            raise ValueError(
                f"The device_mesh was created with device type {self.device_mesh.device_type}, and {device_type} is "
                "asked for"
            )
        return self.device_mesh

    def check(self, num_processes: int) -> None:
        """Raise for what an Accelerator does not serve, or another number of processes.

        Args:
            num_processes: how many there are.

        Raises:
            NotImplementedError: for divided layers or sequences.
            ValueError: for another number of processes.
        """
        divided = self.non_dp_dim_names
        if divided:
            raise NotImplementedError(
                f"ParallelismConfig({divided[0]}_size={self.size_of(divided[0])}) is not served here: "
                "dp_replicate_size and dp_shard_size are; loopwright's FSDPStrategy has tensor_parallel_size="
            )
        if self.total_size not in (1, num_processes):
            raise ValueError(
                f"ParallelismConfig total_size ({self.total_size}) does not match num_processes ({num_processes}). "
                "Please adjust dp_replicate_size/dp_shard_size/tp_size/cp_size/sp_size."
            )
