"""Sharded parameters, gradients and optimizer states: torch's FSDP2, ``fully_shard``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .base import Strategy
from .capabilities import Capabilities
from .distributed_tensors import (
    distribute,
    full_tensor,
    local_tensor,
    shard_of,
    to_shards,
)
from .launch.rendezvous import timing_out
from .module_policy import (
    WITHOUT_FORWARD,
    Policy,
    checkpoint_activations,
    modules_to_wrap,
)
from .optimizer_state import State, named_optimizer_state
from .precision import Precision
from .process_group import ProcessGroupOptions
from .step_module import StepModule
from .stored_tensors import StoredTensor, filled, loaded_otherwise, stored_items

# The key in a module's __dict__ of the StepModule around it that was sharded: a later run finds it there, as sharding
# cannot be undone.
_ROOT = "_fsdp_root"

# Optimizers of torch that compute what its distributed tensors do not support, as of torch 2.13.
UNSHARDED_OPTIMIZERS = ("Adafactor", "Rprop", "SparseAdam")


class FSDPStrategy(Strategy):
    """Shards parameters, gradients and optimizer states over the processes by torch's ``fully_shard``.

    Each wrapped submodule's parameters are gathered for its forward and backward, and freed after it. The parameters
    are ``DTensor``s from then on, and stay so after the run; ``Trainer.export`` and checkpoints give plain ones. Each
    process saves its own part of a checkpoint. Evaluation takes the same number of forwards in all processes: one that
    has no batch left runs its last one again, which counts nothing.

    With one process there is nothing to shard, and it trains as on a single device.

    Args:
        auto_wrap_policy: which submodules are gathered by themselves: classes; a function of a submodule that says
            yes or no; or a number: the outermost ones whose children have at least so many parameters are left to
            them. Default: the children of each ``nn.ModuleList`` and ``nn.Sequential``, as most models have blocks.
        activation_checkpointing: which submodules compute their activations again in the backward pass: classes or a
            function.
        reshard_after_forward: free gathered parameters after the forward pass, to gather them again for the backward.
            False keeps them: faster, more memory. A number gathers within groups of so many processes.
        mp_policy: torch's ``MixedPrecisionPolicy``, by default what ``precision`` says.
        cpu_offload: keep parameters, gradients and optimizer states in the host's memory, where the optimizer steps.
        device_mesh: ``(replicas, shards)``: shard in groups of ``shards`` processes, between which gradients are
            averaged (HSDP); or a ``DeviceMesh`` of one or two dimensions.
        tensor_parallel_size: how many processes share each layer. ``configure_model`` finds
            ``self.device_mesh["tensor_parallel"]`` to parallelize the module with; parameters are then sharded over
            ``["data_parallel"]``.
        process_group_backend: see :class:`~.process_group.ProcessGroupOptions`, as for the two that follow.
        timeout: how long a collective waits for the slowest process.
        max_restarts: how often processes are started again when one fails.
    """

    name = "fsdp"
    capabilities = Capabilities(
        needs_equal_forwards=True,
        shards_state=True,
        replaces_parameters=True,
    )
    synced_forwards = 0

    def __init__(
        self,
        *,
        auto_wrap_policy: Policy | int | None = None,
        activation_checkpointing: Policy | None = None,
        reshard_after_forward: bool | int | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        device_mesh: tuple[int, int] | DeviceMesh | None = None,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = ProcessGroupOptions.timeout,
        max_restarts: int = ProcessGroupOptions.max_restarts,
    ) -> None:
        self.group_options = ProcessGroupOptions(
            process_group_backend, timeout, max_restarts
        )
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward
        self.mp_policy = mp_policy
        self.cpu_offload = cpu_offload
        self.requested_mesh = device_mesh
        self.tensor_parallel_size = tensor_parallel_size
        # A StepModule around the module, sharded; None with one process.
        self._root: Any = None
        # From each parameter that the module had before to the sharded one, as long as anybody holds the former.
        self._sharded: Any = {}

    def check_group(self) -> None:
        size = self.tensor_parallel_size
        # True would pass for 1.
        if type(size) is not int or size < 1 or self.world_size % size:
            raise ValueError(
                f"tensor_parallel_size must be a number that divides the {self.world_size} processes; got {size!r}"
            )
        mesh = self.requested_mesh
        if size > 1 and mesh is not None:
            raise ValueError(
                "device_mesh and tensor_parallel_size cannot both be given"
            )
        is_shape = isinstance(mesh, tuple)
        if is_shape and (len(mesh) != 2 or math.prod(mesh) != self.world_size):
            raise ValueError(
                f"device_mesh must be (replicas, shards) with replicas * shards = {self.world_size}, the number of "
                f"processes; got {mesh!r}"
            )

    def connect(self) -> None:
        super().connect()
        if self.world_size > 1 and self.device_mesh is None:
            self.device_mesh = self._create_mesh()

    def _create_mesh(self) -> DeviceMesh:
        mesh = self.requested_mesh
        if isinstance(mesh, DeviceMesh):
            return mesh
        size = self.tensor_parallel_size
        shape: tuple[int, ...] = (self.world_size,)
        names: tuple[str, ...] = ("data_parallel",)
        if mesh is not None:
            shape = mesh
            names = ("replicate", "shard")
        elif size > 1:
            shape = (self.world_size // size, size)
            names = ("data_parallel", "tensor_parallel")
        with timing_out(self.group_options.timeout):
            return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        if self.world_size == 1:
            return super().setup(module, precision)
        self.module = module
        self._context = precision.forward_context(self.device)
        self._root = vars(module).get(_ROOT)
        if self._root is None:
            self._root = self._prepare_and_shard(module, precision)
        self._root.compute_in(self._context)
        self._reshard()
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.device)
        return module

    def _prepare_and_shard(self, module: nn.Module, precision: Precision) -> Any:
        precision.convert_module(module)
        tensors = [*module.parameters(), *module.buffers()]
        if self.tensor_parallel_size > 1:
            # What configure_model has parallelized is sharded already.
            tensors = [t for t in tensors if not isinstance(t, DTensor)]
        self.group.broadcast_tensors(tensors)
        checkpoint_activations(module, self.activation_checkpointing)
        before = dict(module.named_parameters())
        root = self._shard(module, precision)
        vars(module)[_ROOT] = root
        self._sharded = WeakIdKeyDictionary()
        for name, parameter in module.named_parameters():
            self._sharded[before[name]] = parameter
        return root

    def _shard(self, module: nn.Module, precision: Precision) -> StepModule:
        mesh = self.device_mesh
        assert mesh is not None
        if self.tensor_parallel_size > 1:
            mesh = mesh["data_parallel"]
        # Under autocast, each operation chooses its type. Parameters are gathered in the type that most of them choose,
        # which halves what is sent; gradients are added up in full precision.
        reduce_dtype = precision.reduce
        if reduce_dtype is None and precision.compute is not None:
            reduce_dtype = torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=precision.compute,
            reduce_dtype=reduce_dtype,
            cast_forward_inputs=False,
        )
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": self.mp_policy or policy,
            "offload_policy": offload,
        }
        root = StepModule(module)
        if precision.compute is not None:
            full_precision = {**options, "mp_policy": MixedPrecisionPolicy()}
            for child in module.modules():
                # Batch norms take parameters and statistics of one type.
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    fully_shard(child, **full_precision)
        parts = modules_to_wrap(module, self.auto_wrap_policy)
        if getattr(module, "automatic_optimization", True):
            parts.append(root)
        else:
            # Gradients are computed inside the step, when a forward around it would not have ended.
            parts += self._parts_to_call(module)
        for part in parts:
            if not isinstance(part, FSDPModule):
                fully_shard(part, **options)
        return root

    def _parts_to_call(self, module: nn.Module) -> list[nn.Module]:
        """Return the parts that a step in manual optimization calls, each of which gathers its own parameters.

        Raises:
            ValueError: if a parameter is in none of them, or in two.
        """
        parts: list[nn.Module] = []
        children = list(module.children())
        while children:
            child = children.pop(0)
            if isinstance(child, WITHOUT_FORWARD):
                children[:0] = child.children()
            elif next(child.parameters(), None) is not None:
                parts.append(child)
        owners = Counter(p for part in parts for p in dict.fromkeys(part.parameters()))
        for name, parameter in module.named_parameters():
            if owners[parameter] != 1:
                raise ValueError(
                    f"strategy={self.name!r} in manual optimization gathers the parameters of each submodule for its "
                    f"own forward, and {name} is in {owners[parameter]} of them: let it be in one"
                )
        return parts

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        for optimizer in optimizers:
            name = type(optimizer).__name__
            if self._root is not None and name in UNSHARDED_OPTIMIZERS:
                raise ValueError(
                    f"strategy={self.name!r} shards parameters, and torch has no such arithmetic for {name} (it has "
                    'for AdamW, SGD, Muon and most others): take one of these, or strategy="ddp"'
                )
            for group in optimizer.param_groups:
                # An optimizer that was made before the sharding holds the parameters of then.
                group["params"] = [
                    self._sharded_in(optimizer, parameter)
                    for parameter in group["params"]
                ]
        return super().setup_optimizers(optimizers)

    def _sharded_in(self, optimizer: Optimizer, parameter: Any) -> Any:
        """Return the sharded parameter for one of before the sharding, and move its optimizer state there."""
        sharded = self._sharded.get(parameter, parameter)
        if sharded is not parameter and parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            optimizer.state[sharded] = _distribute_state(state, sharded)
        return sharded

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self._root is None:
            return self.evaluate(step_name, *args, **kwargs)
        self.synced_forwards = (self.synced_forwards or 0) + 1
        return self._root(step_name, *args, **kwargs)

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self._root is None:
            return super().evaluate(step_name, *args, **kwargs)
        output = self._root(step_name, *args, **kwargs)
        # torch leaves some parameters gathered for a backward, which does not come here.
        self._reshard()
        return output

    def _reshard(self) -> None:
        for child in self._root.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def start_evaluation(self) -> None:
        if self._root is not None:
            # Running statistics of batch norms, and other buffers, differ between processes after training.
            self.group.broadcast_tensors(tuple(self.module.buffers()))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sync_in_backward(False)
        try:
            yield
        finally:
            self._sync_in_backward(True)

    def _sync_in_backward(self, sync: bool) -> None:
        for part in () if self._root is None else self._root.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(sync, recurse=False)

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self._root is not None:
            raise RuntimeError(
                f"strategy={self.name!r} averages gradients in the backward pass of a window's last batch: a window "
                "cannot end early (leave an epoch between windows, or use accumulate_grad_batches=1), and a prepared "
                "module is to be called itself, not by its parts"
            )

    def clip_gradients(
        self,
        params: Iterable[Tensor],
        value: float,
        algorithm: str,
        norm: float = 2.0,
    ) -> Any:
        with_gradient: list[Any] = [p for p in params if p.grad is not None]
        if algorithm == "value":
            for parameter in with_gradient:
                parameter.grad.clamp_(-value, value)
            return None
        total = self._norm_of(with_gradient, norm)
        for parameters in _by_mesh(with_gradient):
            nn.utils.clip_grads_with_norm_(parameters, value, total)
        return total

    def gradient_norm(self, params: Iterable[Tensor]) -> Any:
        with_gradient = [p for p in params if p.grad is not None]
        return self._norm_of(with_gradient, 2.0) if with_gradient else None

    def _norm_of(self, with_gradient: list[Any], norm: float) -> Tensor:
        """The norm of the gradients of parameters. A collective."""
        by_mesh = _by_mesh(with_gradient)
        norms = [torch.zeros((), device=self.device)] if not by_mesh else []
        for parameters in by_mesh:
            gradients = [parameter.grad for parameter in parameters]
            mesh_norm = full_tensor(nn.utils.get_total_norm(gradients, norm))
            norms.append(mesh_norm.to(self.device))
        return torch.linalg.vector_norm(torch.stack(norms), norm)

    def model_state(self) -> State:
        if self._root is None:
            return super().model_state()
        return to_shards(self._distributed_state())

    def _distributed_state(self) -> State:
        """The module's state, with distributed tensors."""
        state = self._root.state_dict()
        return {name.removeprefix("module."): state[name] for name in state}

    def load_model_state(self, state: State, strict: bool) -> Any:
        if self._root is None:
            return super().load_model_state(state, strict)
        current = self._distributed_state()
        distributed = {}
        others = loaded_otherwise(self._root.module)
        for name, value in stored_items(state).items():
            like = current.get(name)
            is_stored = isinstance(value, StoredTensor) and _is_alike(value, like)
            if is_stored and not name.startswith(others):
                assert isinstance(like, DTensor)
                shard_of(like).load(value)
                distributed[name] = like
            else:
                distributed[name] = _distribute_like(value, like)
        distributed = filled(distributed, self._root.module, lambda: current)
        return self._root.module.load_state_dict(distributed, strict=strict)

    def local_part(self, tensor: Tensor) -> Tensor:
        return local_tensor(tensor)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        if self._root is None:
            return super().optimizer_state(optimizer)
        self._reshard()
        state = to_shards(optimizer.state_dict())
        return named_optimizer_state(self.module, optimizer, state)

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        if self._root is not None:
            self._reshard()
            parameters = dict(self.module.named_parameters())
            distributed = {
                name: _distribute_state(values, parameters.get(name))
                for name, values in state["state"].items()
            }
            state = {**state, "state": distributed}
        super().load_optimizer_state(optimizer, state)


def _by_mesh(parameters: list[Any]) -> list[list[Any]]:
    """Parameters by the mesh that they are on.

    With tensor parallelism there may be several, and torch takes a norm over one mesh only. The norm of the norms is
    that of all gradients.
    """
    by_mesh: dict[Any, list[Any]] = {}
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        by_mesh.setdefault(mesh, []).append(parameter)
    return list(by_mesh.values())


def _distribute_state(state: State, parameter: Any) -> State:
    """Return the optimizer state of a parameter, with tensors of its shape distributed as the parameter is."""
    return {
        key: _distribute_like(value, parameter)
        for key, value in stored_items(state).items()
    }


def _distribute_like(value: Any, like: Any) -> Any:
    """Return a whole tensor distributed as another one of its shape is; anything else as it is."""
    if _is_alike(value, like):
        return distribute(value, like)
    return value.whole() if isinstance(value, StoredTensor) else value


def _is_alike(value: Any, like: Any) -> bool:
    """Whether a whole tensor can be distributed as another one is."""
    return (
        isinstance(like, DTensor)
        and isinstance(value, (Tensor, StoredTensor))
        and value.shape == like.shape
    )
