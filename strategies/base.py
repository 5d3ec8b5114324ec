"""The strategy contract: where a module runs, in how many processes, and how its state goes in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from .capabilities import Capabilities
from .group import GroupMember
from .launch.environment import ClusterEnvironment
from .module_policy import Policy, checkpoint_activations
from .module_states import ModuleStates
from .precision import Precision
from .process_group import ProcessGroupOptions, create_group


class Strategy(GroupMember, ModuleStates, ABC):
    """Where a module runs. A subclass implements :meth:`forward`, and overrides what else differs; also of the states.

    The order of calls: :meth:`setup_environment` when the Trainer is made; then, in each run, :meth:`connect`,
    :meth:`setup`, :meth:`load_model_state` (with a checkpoint), :meth:`setup_optimizers` (in ``fit``), the optimizers'
    states, the steps, :meth:`teardown`. An Engine sets up a ``copy.copy`` for each module, made after :meth:`connect`.

    Attributes:
        name: what it is called in messages and checkpoints.
        group: the processes, made by :meth:`setup_environment` with ``group_options``.
        module, optimizers: set by :meth:`setup` (before it, one without parameters) and :meth:`setup_optimizers`.
        activation_checkpointing: the submodules that compute their activations again in the backward pass, if any.
        sync_batchnorm: batch norms compute their statistics over all processes.
        device_mesh: the processes, if the strategy arranges them in dimensions.
        tensor_parallel_size: number of processes that share each layer, and so get the same batches.
        keeps_gradients_local: the framework has set that only :meth:`sync_gradients` is to average gradients.
        synced_forwards: number of forwards whose backward averages gradients; None if there is nothing to average.
        inside_forward: a training step is running; then :meth:`prepare_backward` comes before each backward.
        step_was_skipped: a gradient overflowed in the last step of a strategy that owns the loss scale.
    """

    name = "strategy"
    capabilities = Capabilities()
    group_options = ProcessGroupOptions()
    module = nn.Module()
    optimizers: list[Optimizer]
    activation_checkpointing: Policy | None = None
    sync_batchnorm = False
    device_mesh: DeviceMesh | None = None
    tensor_parallel_size = 1
    keeps_gradients_local = False
    synced_forwards: int | None = None
    inside_forward = False
    step_was_skipped = False

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        """Make ``group``, the processes of this job.

        Args:
            devices: one for each process of this machine.
            num_nodes: number of machines.
            environment: what a launcher told this process; None before the others are started, or if there are none.
        """
        self.group = create_group(devices, num_nodes, environment, self.group_options)
        self.check_group()

    def check_group(self) -> None:
        """Raise if the strategy cannot run on the device, or in so many processes, of ``group``."""

    def connect(self) -> None:
        """Meet the other processes, if that is not done; collectives may follow."""
        self.group.join()

    @property
    def is_transparent(self) -> bool:
        """After :meth:`setup`: whether a step is a call of the module and nothing else."""
        return self._context is None and self.group.world_size == 1

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

    def teardown(self, interrupted: bool = False) -> None:
        """Undo :meth:`setup`, but for the device; without collectives if ``interrupted``, as others may not come."""

    @abstractmethod
    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``module.<step_name>(*args)`` to train: in the precision's context, gradients to be averaged."""

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call ``module.<step_name>(*args)`` to evaluate; by default on the module itself, without collectives."""
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
        """Raise if the strategy cannot take such steps, or was configured for others.

        Args:
            batch_size: samples in a batch of one process, if that is known.
            accumulate: batches of an accumulation window.
            clip: what to clip gradients to, if at all.
            algorithm: how, as of :meth:`clip_gradients`.
        """

    def start_epoch(self) -> None:
        """Begin a training epoch; callbacks may have changed which parameters are trained."""

    def start_evaluation(self) -> None:
        """Begin an evaluation, in all ranks: make equal what training leaves different, such as buffers."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients."""
        loss.backward(*args, **kwargs)

    def prepare_backward(self, loss: Tensor) -> None:
        """Prepare for the backward of ``loss`` inside a step, as manual optimization runs it."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """A context around forward and backward in which gradients stay local."""
        return nullcontext()

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average gradients that are still local, where no further backward will do it. A collective."""

    def clip_gradients(
        self, params: Iterable[Tensor], value: float, algorithm: str, norm: float = 2.0
    ) -> Any:
        """Clip gradients; return their norm before, if it was computed.

        Args:
            params: whose gradients.
            value: the largest norm, or the largest absolute value.
            algorithm: ``"norm"`` scales all by one factor, ``"value"`` clips each by itself.
            norm: the order of the norm.
        """
        if algorithm == "value":
            return nn.utils.clip_grad_value_(params, value)
        return nn.utils.clip_grad_norm_(params, value, norm)

    def gradient_norm(self, params: Iterable[Tensor]) -> Any:
        """The norm of all gradients, a number or a tensor; None where there are none. All ranks call it together."""
        gradients = [p.grad for p in params if p.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else None

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply gradients.

        Args:
            optimizer: of whose parameters.
            factor: a number or a 0-dim tensor.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def step(self, optimizer: Optimizer) -> Any:
        """Update the parameters."""
        return optimizer.step()
