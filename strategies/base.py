"""The strategy contract: where a module runs, in how many processes, and how its state goes in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .module_policy import Policy, checkpoint_activations
from .optimizer_state import (
    number_optimizer_state,
    parameter_names,
    parameters_of,
    rename_optimizer_state,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from .launch.environment import ClusterEnvironment
    from .precision import Precision


class Strategy(ABC):
    """Where a module runs.

    The order of calls: :meth:`setup_environment` when the Trainer is made; then, in each run, :meth:`connect`,
    :meth:`setup`, :meth:`load_model_state` (with a checkpoint), :meth:`setup_optimizers` (in ``fit``), the optimizers'
    states, the steps, :meth:`teardown`. The Engine takes a ``copy.copy`` made after :meth:`connect` for each module.

    Attributes:
        name: what it is called in messages and checkpoints.
        equal_forwards: evaluation needs the same number of forward passes on all ranks.
        synced_forwards: forwards so far whose backward averages gradients; None if there is nothing to average.
        keeps_gradients_local: :meth:`sync_gradients` alone averages gradients; None if that is not possible.
        owns_loss_scale: the strategy scales losses itself, and tells ``step_was_skipped``; no ``GradScaler`` is made.
        manual_optimization: whether a step may compute gradients and step optimizers itself.
        one_module: an Engine can prepare one module only.
        shards_state: states hold a :class:`~.tensor_shards.TensorShard` for each sharded tensor.
        replaces_parameters: :meth:`setup` does; an optimizer made before goes through :meth:`setup_optimizers`.
        activation_checkpointing: the submodules that compute their activations again in the backward pass, if any.
        device_mesh: the processes, if the strategy arranges them in dimensions.
        sync_batchnorm: whether batch norms compute their statistics over all processes.
        max_restarts: how often processes that we started are started again when one fails.
        device, world_size, global_rank, local_rank, node_rank: this process among its peers.
        tensor_parallel_size: how many of them share each layer, and so their batches.
        failed: whether hooks run after an exception: no collectives there.
        inside_forward: whether a training step is running; then :meth:`prepare_backward` comes before each backward.
        module, optimizers: set by :meth:`setup` and :meth:`setup_optimizers`; the latter is settable.
    """

    name = "strategy"
    synced_forwards: int | None = None
    keeps_gradients_local: bool | None = None
    equal_forwards = owns_loss_scale = shards_state = replaces_parameters = (
        one_module
    ) = sync_batchnorm = False
    manual_optimization = True
    activation_checkpointing: Policy | None = None
    device_mesh: DeviceMesh | None = None
    max_restarts = 0
    device = torch.device("cpu")
    world_size, global_rank, local_rank, node_rank, tensor_parallel_size = 1, 0, 0, 0, 1
    inside_forward = failed = step_was_skipped = False
    module: nn.Module
    optimizers: list[Optimizer]

    @abstractmethod
    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        """Choose this process's device, and learn its place among its peers.

        Args:
            devices: one for each process of this machine.
            num_nodes: number of machines.
            environment: what a launcher told this process; None before the others are started, or if there are none.
        """

    def connect(self) -> None:
        """Join the peers, if that is not done; collectives may follow."""

    def disconnect(self) -> None:
        """Undo :meth:`connect`. All processes do."""

    @property
    def is_transparent(self) -> bool:
        """After :meth:`setup`: whether a step is a call of the module and nothing else."""
        return self._context is None and self.world_size == 1

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        """Move ``module`` to the device and convert it; return it."""
        self.module = module
        module.to(self.device)
        precision.convert_module(module)
        checkpoint_activations(module, self.activation_checkpointing)
        self._context = precision.forward_context(self.device)
        return module

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Take the optimizers made for the module; return those that the loop shall step."""
        self.optimizers = optimizers
        return optimizers

    def teardown(self) -> None:
        """Undo what :meth:`setup` did to the module beside moving it."""

    @abstractmethod
    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``module.<step_name>(*args)`` for training: in the precision's context, synchronised with peers."""

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``module.<step_name>(*args)`` for evaluation, by default on the bare module: without collectives."""
        # As StepModule does, without the frames of nn.Module.__call__: there is nothing here to intercept it.
        if self._context is None:
            return getattr(self.module, step_name)(*args, **kwargs)
        with self._context:
            return getattr(self.module, step_name)(*args, **kwargs)

    def init_context(self, precision: Precision) -> AbstractContextManager[Any]:
        """A context in which ``configure_model`` makes the module's parts."""
        return nullcontext()

    def check_steps(
        self,
        batch_size: int | None,
        accumulate: int,
        clip: float | None,
        algorithm: str | None,
    ) -> None:
        """Raise if the strategy cannot take such steps, or was configured for others."""

    def start_epoch(self) -> None:
        """A training epoch is about to begin; callbacks may have changed which parameters are trained."""

    def start_evaluation(self) -> None:
        """All ranks are about to evaluate: make equal what training leaves different."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients."""
        loss.backward(*args, **kwargs)

    def prepare_backward(self, loss: Tensor) -> None:
        """Inside a step (manual optimization), the gradients of ``loss`` are about to be computed."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """A context around forward and backward in which gradients stay local."""
        return nullcontext()

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average gradients that :meth:`no_sync` kept local, when no other backward will. A collective."""

    def clip_gradients(
        self,
        parameters: Iterable[Tensor],
        value: float,
        algorithm: str,
        norm: float = 2.0,
    ) -> Any:
        """Clip gradients by their global ``"norm"``, which is returned, or each by ``"value"``."""
        if algorithm == "value":
            return nn.utils.clip_grad_value_(parameters, value)
        return nn.utils.clip_grad_norm_(parameters, value, norm)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply the gradients of an optimizer's parameters."""
        for parameter in parameters_of(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def step(self, optimizer: Optimizer) -> Any:
        """Update the parameters."""
        return optimizer.step()

    def model_state(self) -> dict[str, Any]:
        """Parameters and buffers by name; tensors may be aliases of the living ones."""
        return self.module.state_dict()

    def load_model_state(self, state: dict[str, Any], strict: bool) -> Any:
        """Load what :meth:`model_state` returned; the result is that of ``nn.Module.load_state_dict``."""
        return self.module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """``{"state": {parameter name: {...}}, "param_groups": [{..., "params": [names]}]}``, for any strategy."""
        return rename_optimizer_state(
            optimizer.state_dict(), parameter_names(self.module, optimizer)
        )

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what :meth:`optimizer_state` returned, matching parameters by name."""
        optimizer.load_state_dict(
            number_optimizer_state(state, parameter_names(self.module, optimizer))
        )

    # -- peers: with one process, each of these gives back what it got ------------------------------------------

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main process."""
        return self.global_rank == 0

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """``"mean"``, ``"sum"``, ``"min"`` or ``"max"`` over all processes."""
        return tensor

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """The tensors of all processes, stacked along a new first dimension if there are several processes."""
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes, by rank: anything that can be pickled."""
        return [value]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """``value`` of process ``source``, on all processes."""
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
