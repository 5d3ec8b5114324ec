"""A replica of the module in each process, whose gradients torch's DistributedDataParallel averages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import (
    _flatten_dense_tensors,
    _take_tensors,
    _unflatten_dense_tensors,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .base import Strategy
from .capabilities import Capabilities
from .group import Group
from .module_policy import Policy
from .precision import Precision
from .process_group import BUCKET_BYTES, ProcessGroupOptions
from .step_module import StepModule


class _DDPModule(DistributedDataParallel):
    """Puts gradients into the same buckets in all steps, the first one included, so that a resumed run is exact.

    torch's class fills its buckets anew after the first backward, in the order in which gradients came. So the first
    step of a resumed run would add up the gradients of all processes in other buckets than the same step of a run
    without a stop, and would round otherwise.

    Args:
        module: a :class:`~.step_module.StepModule` around the user's.
        **options: of ``DistributedDataParallel``.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        # With unused parameters and no static graph, torch keeps its first buckets, and needs no help.
        self.rebuilds_buckets = (
            options["static_graph"] or not options["find_unused_parameters"]
        )
        super().__init__(module, **options)
        if self.rebuilds_buckets:
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()  # collective

    def _build_params_for_reducer(self) -> tuple[list[Tensor], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        if self.rebuilds_buckets:
            # Buckets are communicated in their order. The last parameters have their gradients first: with them in
            # front, the communication begins while the backward runs.
            parameters = parameters[::-1]
            sparse = sparse[::-1]
        self.reducer_parameters = parameters
        return parameters, sparse

    def prepare_backward(self, loss: Tensor, averages: bool) -> None:
        """Prepare for a backward inside the forward; by itself, DDP does so at the forward's end.

        Args:
            loss: whose gradients are about to be computed.
            averages: whether they are averaged over the processes.
        """
        if averages:
            self.reducer.prepare_for_backward(
                [loss] if self.find_unused_parameters else []
            )
        # The end of the forward must not prepare for another one.
        self.require_backward_grad_sync = False

    def end_step(self) -> None:
        """After a forward with backwards inside it: let the next one communicate."""
        self.require_forward_param_sync = True
        self.require_backward_grad_sync = True

    def check_gradients(self) -> None:
        """See whether the last backward has given all parameters their gradients, as the processes wait for them.

        Raises:
            RuntimeError: if it has not, naming those that are left.
        """
        try:
            # torch checks the gradients first in this call, and then finds the buckets built already.
            self.reducer._rebuild_buckets()
        except RuntimeError as error:
            self.name_unused_parameters(error)
            raise

    def name_unused_parameters(self, error: RuntimeError) -> None:
        """Name the parameters in an error of DDP's, which tells their numbers.

        Raises:
            RuntimeError: if it is that error.
        """
        match = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if match is None:
            return
        user_module: Any = self.module.module
        names = {
            id(parameter): name for name, parameter in user_module.named_parameters()
        }
        numbers = map(int, match[1].split())
        unused = [names[id(self.reducer_parameters[number])] for number in numbers]
        others = f" and {len(unused) - 10} others" if len(unused) > 10 else ""
        raise RuntimeError(
            f"the loss of the last step did not depend on {', '.join(unused[:10])}{others}, and so the processes could "
            "not average all gradients. Freeze what is not trained (requires_grad_(False)), or set "
            'strategy="ddp_find_unused_parameters_true"'
        ) from None


class DDPStrategy(Strategy):
    """Trains replicas of the module on several devices or machines, with averaged gradients.

    Evaluation runs on the bare module, without collectives: processes may evaluate different numbers of batches. With
    one process there is nothing to wrap, and it trains as on a single device.

    Args:
        find_unused_parameters: look in each step for parameters that the loss does not depend on. Needed if there are
            any, as with several optimizers in manual optimization; it costs time.
        static_graph: promise that each step uses the same parameters in the same order.
        gradient_as_bucket_view: let gradients be views of the buffers that are communicated: no copies, less memory.
        bucket_cap_mb: size of these buffers in MB (default: torch's 25).
        broadcast_buffers: give all processes rank 0's buffers (such as running statistics) before each forward.
        ddp_comm_hook: how gradients are communicated: a hook of ``torch.distributed.algorithms.ddp_comm_hooks``.
        ddp_comm_state: the hook's state.
        ddp_comm_wrapper: wraps the hook, such as ``fp16_compress_wrapper``.
        sync_batchnorm: let batch norms compute their statistics over all processes (not on the CPU).
        activation_checkpointing: which submodules compute their activations again in the backward pass: classes or a
            function.
        process_group_backend: see :class:`~.process_group.ProcessGroupOptions`, as for the two that follow.
        timeout: how long a collective waits for the slowest process.
        max_restarts: how often processes are started again when one fails.
        **kwargs: further arguments of ``DistributedDataParallel``.
    """

    name = "ddp"
    capabilities = Capabilities(can_delay_sync=True)

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        sync_batchnorm: bool = False,
        activation_checkpointing: Policy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = ProcessGroupOptions.timeout,
        max_restarts: int = ProcessGroupOptions.max_restarts,
        **kwargs: Any,
    ) -> None:
        self.group_options = ProcessGroupOptions(
            process_group_backend, timeout, max_restarts
        )
        self.options = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **kwargs,
        }
        self.broadcast_buffers = broadcast_buffers
        if not broadcast_buffers:
            # torch 2.13 has renamed the argument.
            renamed = "forward_sync_buffers"
            known = signature(DistributedDataParallel).parameters
            self.options[renamed if renamed in known else "broadcast_buffers"] = False
        self.comm_state = ddp_comm_state
        self.comm_hook = ddp_comm_hook
        if ddp_comm_hook is not None and ddp_comm_wrapper is not None:
            self.comm_hook = ddp_comm_wrapper(ddp_comm_hook)
        self.sync_batchnorm = sync_batchnorm
        self.activation_checkpointing = activation_checkpointing
        self.synced_forwards = 0
        self.torn_down = False
        self._ddp: _DDPModule | None = None
        # Ids of the parameters that were trained when DDP was wrapped around the module.
        self._wrapped: list[int] = []
        # Whether no_sync has not been entered since then: under static_graph, its first backward is not a local one.
        self._before_first_backward = True
        # Inside a step (manual optimization): whether no_sync is open, and whether a backward has been prepared.
        self._inside_no_sync = False
        self._backward_prepared = False
        # The user's batch norms that are replaced: parent, name, module.
        self._batchnorms: list[tuple[nn.Module, str, nn.Module]] = []

    def check_group(self) -> None:
        if self.sync_batchnorm and self.world_size > 1 and self.device.type == "cpu":
            raise ValueError(
                "sync_batchnorm=True: torch has no synchronised batch norm for the CPU; leave it out there"
            )

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        super().setup(module, precision)
        self._batchnorms = []
        self.torn_down = False
        self.group.broadcast_tensors((*module.parameters(), *module.buffers()))
        if self.world_size > 1 and self.sync_batchnorm:
            self._replace_batchnorms(module)
        return module

    def _replace_batchnorms(self, module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                is_batchnorm = isinstance(child, nn.modules.batchnorm._BatchNorm)
                if is_batchnorm and not isinstance(child, nn.SyncBatchNorm):
                    self._batchnorms.append((parent, name, child))
                    # The replacement has the same tensors, so optimizers need not know.
                    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(child)
                    setattr(parent, name, synchronised)

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        if self.world_size > 1:
            # DDP is not made before it is known which parameters are trained.
            self._wrap()
        return super().setup_optimizers(optimizers)

    def start_epoch(self) -> None:
        trainable = self._trainable() if self.world_size > 1 else []
        if trainable and trainable != self._wrapped:
            # DDP would not average the gradients of parameters that were frozen when it was made.
            self._wrap()

    def _trainable(self) -> list[int]:
        parameters = self.module.parameters()
        return [id(parameter) for parameter in parameters if parameter.requires_grad]

    def _wrap(self) -> None:
        self._wrapped = self._trainable()
        self._before_first_backward = True
        self._ddp = None
        if not self._wrapped or self.keeps_gradients_local:
            # DDP refuses a module of which nothing is trained.
            return
        # device_ids are left out: with them, DDP would move batches, which are on the device already.
        self._ddp = _DDPModule(StepModule(self.module, self._context), **self.options)
        if self.comm_hook is not None:
            self._ddp.register_comm_hook(self.comm_state, self.comm_hook)

    @property
    def joinable(self) -> DistributedDataParallel | None:
        """What torch's ``Join`` takes; None where nothing communicates."""
        return self._ddp

    def teardown(self, interrupted: bool = False) -> None:
        ddp = self._ddp
        self._ddp = None
        self.torn_down = True
        for parent, name, batchnorm in self._batchnorms:
            batchnorm.train(getattr(parent, name).training)
            setattr(parent, name, batchnorm)
        self._batchnorms.clear()
        if ddp is not None and not interrupted:
            ddp.check_gradients()

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        ddp = self._ddp
        if ddp is None:
            if self._computes_alone():
                return self.evaluate(step_name, *args, **kwargs)
            # All parameters were frozen until now.
            self._wrap()
            ddp = self._ddp
            assert ddp is not None
        if ddp.require_backward_grad_sync:
            self.synced_forwards = (self.synced_forwards or 0) + 1
        self.inside_forward = True
        try:
            return ddp(step_name, *args, **kwargs)
        except RuntimeError as error:
            ddp.name_unused_parameters(error)
            raise
        finally:
            self.inside_forward = False
            if self._backward_prepared:
                self._backward_prepared = False
                ddp.end_step()

    def _computes_alone(self) -> bool:
        """Whether a step of the bare module is right, as there are no gradients for DDP to average."""
        if self.group.world_size == 1 or self.keeps_gradients_local or self.torn_down:
            return True
        return not self._trainable()

    def prepare_backward(self, loss: Tensor) -> None:
        if self._ddp is not None:
            self._ddp.prepare_backward(loss, averages=not self._inside_no_sync)
            self._backward_prepared = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        ddp = self._ddp
        if ddp is None or (ddp.static_graph and self._before_first_backward):
            # Under static_graph, DDP learns the graph in its first backward, which must not be a local one. So the
            # window's first gradients are averaged at once; that they are averaged again at its end changes nothing.
            self._before_first_backward = False
            yield
        elif self.inside_forward:
            self._inside_no_sync = True
            try:
                yield
            finally:
                self._inside_no_sync = False
        else:
            with ddp.no_sync():
                yield

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self.world_size > 1:
            _average_gradients(self.group, parameters)

    def start_evaluation(self) -> None:
        if self._ddp is not None:
            self._ddp.check_gradients()
        if self.broadcast_buffers:
            # Each process has changed the running statistics since they were made equal, before the last forward.
            self.group.broadcast_tensors(tuple(self.module.buffers()))


def _average_gradients(group: Group, parameters: Iterable[Tensor]) -> None:
    """Average gradients over the processes: a collective for each 32 MB of them, and one more.

    A parameter without a gradient here counts as one with a gradient of zeros, unless it has none in any process.

    Args:
        group: the processes.
        parameters: the same in all processes; those that are not trained are left out.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has_gradient = [float(parameter.grad is not None) for parameter in trained]
    has_gradient_somewhere = group.reduce(torch.tensor(has_gradient), "max").tolist()
    gradients = []
    for parameter, somewhere in zip(trained, has_gradient_somewhere, strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _take_tensors(gradients, BUCKET_BYTES):
        flat = group.reduce(_flatten_dense_tensors(bucket))
        means = _unflatten_dense_tensors(flat, bucket)
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean)
