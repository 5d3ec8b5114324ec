"""Parameters, gradients and optimizer states in parts: torch's FSDP2, ``fully_shard``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

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

from .distributed_tensors import distribute, full_tensor, to_shards
from .launch.environment import ClusterEnvironment
from .module_policy import Policy, checkpoint_activations, matches
from .optimizer_state import parameter_names, rename_optimizer_state
from .precision import Precision
from .process_group import ProcessGroupStrategy
from .step_module import StepModule

_ROOT = "_fsdp_root"  # in a sharded module's __dict__: sharding cannot be undone, and what owns it lives as long


class FSDPStrategy(ProcessGroupStrategy):
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
        process_group_backend: such as ``"gloo"``; by default the device's own, with gloo beside it for the CPU.
        timeout: how long a collective waits for the slowest process before the run is given up.
        max_restarts: how often processes that we started are started again when one fails.
    """

    name = "fsdp"
    equal_forwards = True
    shards_state = True
    manual_optimization = False
    replaces_parameters = True
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
        timeout: timedelta = timedelta(minutes=30),
        max_restarts: int = 0,
    ) -> None:
        super().__init__(process_group_backend, timeout, max_restarts)
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward
        self.mp_policy, self.cpu_offload = mp_policy, cpu_offload
        self.asked_mesh, self.tensor_parallel_size = device_mesh, tensor_parallel_size
        self._root: Any = None  # a StepModule around the module, sharded
        self._sharded_into: Any = {}  # by the parameter before, while it lives: what is trained

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        super().setup_environment(devices, num_nodes, environment)
        size, mesh = self.tensor_parallel_size, self.asked_mesh
        if (
            isinstance(size, bool)
            or not isinstance(size, int)
            or size < 1
            or self.world_size % size
        ):
            raise ValueError(
                f"tensor_parallel_size must be a number that divides the {self.world_size} processes; got {size!r}"
            )
        if size > 1 and mesh is not None:
            raise ValueError(
                "device_mesh and tensor_parallel_size cannot both be given"
            )
        if isinstance(mesh, tuple) and (
            len(mesh) != 2 or math.prod(mesh) != self.world_size
        ):
            raise ValueError(
                f"device_mesh must be (replicas, shards) with replicas * shards = {self.world_size}, the number of "
                f"processes; got {mesh!r}"
            )

    def connect(self) -> None:
        super().connect()
        if self.world_size == 1 or self.device_mesh is not None:
            return
        kind, mesh, size = self.device.type, self.asked_mesh, self.tensor_parallel_size
        if isinstance(mesh, DeviceMesh):
            self.device_mesh = mesh
        elif mesh is not None:
            self.device_mesh = init_device_mesh(
                kind, mesh, mesh_dim_names=("replicate", "shard")
            )
        elif size > 1:
            names = ("data_parallel", "tensor_parallel")
            self.device_mesh = init_device_mesh(
                kind, (self.world_size // size, size), mesh_dim_names=names
            )
        else:
            self.device_mesh = init_device_mesh(
                kind, (self.world_size,), mesh_dim_names=("data_parallel",)
            )

    # -- the module -------------------------------------------------------------------------------------------

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        if self.world_size == 1:
            return super().setup(module, precision)
        self.module = module
        self._context = precision.forward_context(self.device)
        self._root = vars(module).get(_ROOT)
        if self._root is None:
            precision.convert_module(module)
            parallel = (
                self.tensor_parallel_size > 1
            )  # what configure_model has parallelized is in parts already
            tensors = (*module.parameters(), *module.buffers())
            self.equalize(
                t for t in tensors if not (parallel and isinstance(t, DTensor))
            )
            checkpoint_activations(module, self.activation_checkpointing)
            before = dict(module.named_parameters())
            self._root = vars(module)[_ROOT] = self._shard(module, precision)
            self._sharded_into = WeakIdKeyDictionary()
            for name, parameter in module.named_parameters():
                self._sharded_into[before[name]] = parameter
        self._root.context = self._context
        self._reshard()
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.device)
        return module

    def _shard(self, module: nn.Module, precision: Precision) -> StepModule:
        assert self.device_mesh is not None
        mesh = (
            self.device_mesh["data_parallel"]
            if self.tensor_parallel_size > 1
            else self.device_mesh
        )
        # Under autocast, operations choose their types themselves; parameters are gathered in the type of most of them.
        policy = MixedPrecisionPolicy(
            param_dtype=precision.compute,
            reduce_dtype=precision.reduce
            or (torch.float32 if precision.compute else None),
            cast_forward_inputs=False,
        )
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if self.cpu_offload
            else OffloadPolicy()
        )
        options: dict[str, Any] = {
            "mesh": mesh, "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": self.mp_policy or policy, "offload_policy": offload,
        }  # fmt: skip
        root = StepModule(module)
        for part in module.modules() if precision.compute is not None else ():
            if isinstance(
                part, nn.modules.batchnorm._BatchNorm
            ):  # which wants parameters and statistics of one type
                fully_shard(part, **{**options, "mp_policy": MixedPrecisionPolicy()})
        for part in self._to_wrap(module):
            if not isinstance(part, FSDPModule):
                fully_shard(part, **options)
        fully_shard(root, **options)
        return root

    def _to_wrap(self, module: nn.Module) -> list[nn.Module]:
        """The submodules to be gathered by themselves, inner ones first."""
        policy = self.auto_wrap_policy
        if policy is None:
            lists = [
                part
                for part in module.modules()
                if isinstance(part, (nn.ModuleList, nn.Sequential))
            ]
            chosen = {id(block) for part in lists for block in part.children()} - {
                id(part) for part in lists
            }
        elif isinstance(policy, int) and not isinstance(policy, bool):
            chosen = _of_size(module, policy)
        else:
            parts = [part for part in module.modules() if part is not module]
            chosen = {id(part) for part in parts if matches(cast(Policy, policy), part)}
        containers = (
            nn.ModuleList,
            nn.ModuleDict,
            nn.ParameterList,
            nn.ParameterDict,
        )  # have no forward
        return [
            part
            for part in reversed(list(module.modules()))
            if id(part) in chosen
            and any(True for _ in part.parameters())
            and not isinstance(part, containers)
        ]

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        for optimizer in optimizers:
            for group in (
                optimizer.param_groups
            ):  # one that was made before knows the parameters of then
                before, group["params"] = (
                    group["params"],
                    [self._sharded_into.get(p, p) for p in group["params"]],
                )
                for old, new in zip(before, group["params"], strict=True):
                    if old is not new and old in optimizer.state:
                        optimizer.state[new] = _spread(optimizer.state.pop(old), new)
        return super().setup_optimizers(optimizers)

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self._root is None:
            return self.evaluate(step_name, *args, **kwargs)
        self.synced_forwards = (self.synced_forwards or 0) + 1
        return self._root(step_name, *args, **kwargs)

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        root = self._root
        if root is None:
            return super().evaluate(step_name, *args, **kwargs)
        output = root(step_name, *args, **kwargs)
        self._reshard()  # torch leaves some gathered for a backward that does not come
        return output

    def _reshard(self) -> None:
        for part in self._root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def start_evaluation(self) -> None:
        if self._root is not None:
            self.equalize(
                self.module.buffers()
            )  # running statistics are each process's own

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        root = self._root
        if root is None:
            yield
            return
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self._root is not None:
            raise RuntimeError(
                f"strategy={self.name!r} averages gradients in the backward pass of a window's last batch: a window "
                "cannot end early (leave an epoch between windows, or use accumulate_grad_batches=1), and a prepared "
                "module is to be called itself, not by its parts"
            )

    def clip_gradients(
        self,
        parameters: Iterable[Tensor],
        value: float,
        algorithm: str,
        norm: float = 2.0,
    ) -> Any:
        found: list[Any] = [
            parameter for parameter in parameters if parameter.grad is not None
        ]
        if algorithm == "value":
            for parameter in found:
                parameter.grad.clamp_(-value, value)
            return None
        # The norm over each mesh (with tensor parallelism there may be several), and of these norms.
        meshes: dict[Any, list[Any]] = {}
        for parameter in found:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(
                parameter
            )
        norms = [
            full_tensor(nn.utils.get_total_norm([p.grad for p in own], norm))
            for own in meshes.values()
        ]
        total = torch.linalg.vector_norm(
            torch.stack([each.to(self.device) for each in norms or [torch.zeros(())]]),
            norm,
        )
        for own in meshes.values():
            nn.utils.clip_grads_with_norm_(own, value, total)
        return total

    # -- states -----------------------------------------------------------------------------------------------

    def model_state(self) -> dict[str, Any]:
        return super().model_state() if self._root is None else to_shards(self._state())

    def _state(self) -> dict[str, Any]:
        assert self._root is not None
        return {
            name.removeprefix("module."): value
            for name, value in self._root.state_dict().items()
        }

    def load_model_state(self, state: dict[str, Any], strict: bool) -> Any:
        if self._root is None:
            return super().load_model_state(state, strict)
        now = self._state()
        spread = {
            name: distribute(value, like)
            if isinstance(like := now.get(name), DTensor) and value.shape == like.shape
            else value
            for name, value in state.items()
        }
        return self._root.module.load_state_dict(spread, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._root is None:
            return super().optimizer_state(optimizer)
        self._reshard()
        return rename_optimizer_state(
            to_shards(optimizer.state_dict()), parameter_names(self.module, optimizer)
        )

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if self._root is not None:
            self._reshard()
            parameters = dict(self.module.named_parameters())
            spread = {
                name: _spread(own, parameters[name]) if name in parameters else own
                for name, own in state["state"].items()
            }
            state = {**state, "state": spread}
        super().load_optimizer_state(optimizer, state)


def _spread(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
    """A parameter's optimizer state, with what has its shape spread as it is."""
    return {
        key: distribute(value, parameter)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def _of_size(module: nn.Module, least: int) -> set[int]:
    """The submodules that have so many parameters, less those inside that are gathered by themselves."""
    chosen: set[int] = set()

    def left(part: nn.Module) -> int:
        own = sum(parameter.numel() for parameter in part.parameters(recurse=False))
        total = own + sum(left(child) for child in part.children())
        if total >= least and part is not module:
            chosen.add(id(part))
            return 0
        return total

    left(module)
    return chosen
