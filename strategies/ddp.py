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
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .launch.environment import ClusterEnvironment
from .module_policy import Policy
from .precision import Precision
from .process_group import ProcessGroupStrategy
from .step_module import StepModule

_BUCKET = 2**23  # numbers that are averaged in one collective


class _FixedBuckets(DistributedDataParallel):
    """Fills its buckets from the beginning as it does for good.

    By itself it takes the order of the first backward for those that follow. Then the first step of a resumed run adds
    up the processes' gradients in other parts than the same step of the whole run, and so rounds otherwise.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        # Else torch keeps its first buckets.
        self.rebuilds_buckets = (
            options["static_graph"] or not options["find_unused_parameters"]
        )
        super().__init__(module, **options)
        if self.rebuilds_buckets:
            self.reducer._push_all_rebuilt_params()
            # A collective.
            self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[Tensor], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        if self.rebuilds_buckets:
            # Buckets are communicated in their order. The last parameters have their gradients first: with them in
            # front, the communication begins while the backward runs.
            parameters = parameters[::-1]
            sparse = sparse[::-1]
        self.in_order = parameters
        return parameters, sparse

    def check_gradients(self) -> None:
        """See whether the last backward has given all parameters their gradients, as the processes wait for them.

        Raises:
            RuntimeError: if it has not, naming those that are left.
        """
        try:
            # Looks for it before anything else, and has nothing else to do.
            self.reducer._rebuild_buckets()
        except RuntimeError as error:
            self.name_unused_parameters(error)
            raise

    def name_unused_parameters(self, error: RuntimeError) -> None:
        """Raise in other words what DDP finds at the next step: there, parameters have numbers."""
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if found is None:
            return
        names = {
            id(parameter): name
            for name, parameter in self.module.module.named_parameters()
        }
        unused = [names[id(self.in_order[int(index)])] for index in found[1].split()]
        others = f" and {len(unused) - 10} others" if len(unused) > 10 else ""
        raise RuntimeError(
            f"the loss of the last step did not depend on {', '.join(unused[:10])}{others}, and so the processes could "
            "not average all gradients. Freeze what is not trained (requires_grad_(False)), or set "
            'strategy="ddp_find_unused_parameters_true"'
        ) from None


class DDPStrategy(ProcessGroupStrategy):
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
        process_group_backend: such as ``"gloo"``; by default the device's own, with gloo beside it for the CPU.
        timeout: how long a collective waits for the slowest process before the run is given up.
        max_restarts: how often processes that we started are started again when one fails (with ``ckpt_path="last"``,
            the run goes on).
        **kwargs: further arguments of ``DistributedDataParallel``.
    """

    name = "ddp"
    keeps_gradients_local = False

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
        timeout: timedelta = timedelta(minutes=30),
        max_restarts: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(process_group_backend, timeout, max_restarts)
        self.options = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **kwargs,
        }
        self.broadcast_buffers = broadcast_buffers
        if not broadcast_buffers:  # torch 2.13 gave it another name
            renamed = (
                "forward_sync_buffers" in signature(DistributedDataParallel).parameters
            )
            self.options["forward_sync_buffers" if renamed else "broadcast_buffers"] = (
                False
            )
        self.comm_hook, self.comm_state, self.comm_wrapper = (
            ddp_comm_hook,
            ddp_comm_state,
            ddp_comm_wrapper,
        )
        self.sync_batchnorm = sync_batchnorm
        self.activation_checkpointing = activation_checkpointing
        self._ddp: _FixedBuckets | None = None
        self._local = False  # inside no_sync, in a step
        self.synced_forwards = 0
        self.torn_down = False
        self._first = True  # until the first backward after DDP was made
        self._wrapped: list[int] = []  # what was trained then
        self._prepared = False  # whether a backward has run in this step
        self._replaced: list[
            tuple[nn.Module, str, nn.Module]
        ] = []  # batch norms: parent, name, the user's own

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        super().setup_environment(devices, num_nodes, environment)
        if self.sync_batchnorm and self.world_size > 1 and self.device.type == "cpu":
            raise ValueError(
                "sync_batchnorm=True: torch has no synchronised batch norm for the CPU; leave it out there"
            )

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        super().setup(module, precision)
        self._replaced = []
        self.torn_down = False
        if self.world_size > 1:
            self.equalize((*module.parameters(), *module.buffers()))
            if self.sync_batchnorm:
                self._convert_batchnorms(module)
        return module

    def _convert_batchnorms(self, module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(
                    child, nn.modules.batchnorm._BatchNorm
                ) and not isinstance(child, nn.SyncBatchNorm):
                    self._replaced.append((parent, name, child))
                    setattr(
                        parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child)
                    )  # has the same tensors

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        if self.world_size > 1:
            # As late as this, when it is known which parameters are trained.
            self._wrap()
        return super().setup_optimizers(optimizers)

    def _trainable(self) -> list[int]:
        return [
            id(parameter)
            for parameter in self.module.parameters()
            if parameter.requires_grad
        ]

    def start_epoch(self) -> None:
        trainable = self._trainable() if self.world_size > 1 else []
        if trainable and trainable != self._wrapped:
            self._wrap()  # DDP would not average what was frozen when it was made

    def _wrap(self) -> None:
        self._wrapped = self._trainable()
        self._first = True
        self._ddp = None
        if not self._wrapped or self.keeps_gradients_local:
            return  # DDP refuses a module of which nothing is trained
        # Without device_ids: DDP would move batches that are where they belong.
        self._ddp = _FixedBuckets(
            StepModule(self.module, self._context), **self.options
        )
        if self.comm_hook is not None:
            hook = (
                self.comm_hook
                if self.comm_wrapper is None
                else self.comm_wrapper(self.comm_hook)
            )
            self._ddp.register_comm_hook(self.comm_state, hook)

    def teardown(self) -> None:
        ddp = self._ddp
        self._ddp = None
        self.torn_down = True
        for parent, name, own in self._replaced:
            setattr(parent, name, own.train(getattr(parent, name).training))
        self._replaced.clear()
        if ddp is not None and not self.failed:
            ddp.check_gradients()

    # -- steps ------------------------------------------------------------------------------------------------

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        ddp = self._ddp
        if ddp is None:
            if (
                self.world_size == 1
                or self.keeps_gradients_local
                or self.torn_down
                or not self._trainable()
            ):
                return self.evaluate(step_name, *args, **kwargs)
            self._wrap()  # all was frozen until now
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
            if self._prepared:
                self._prepared = False
                ddp.require_backward_grad_sync = ddp.require_forward_param_sync = True

    def prepare_backward(self, loss: Tensor) -> None:
        # DDP prepares for a backward at the end of its forward. This one comes before; then there must be no other.
        ddp = self._ddp
        if ddp is None:
            return
        if not self._local:
            ddp.reducer.prepare_for_backward(
                [loss] if ddp.find_unused_parameters else []
            )
        ddp.require_backward_grad_sync = False
        self._prepared = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        if self._ddp is None or (self._first and self._ddp.static_graph):
            # Under static_graph, DDP learns the graph in its first backward, which must not be a local one. To average
            # the window's first gradients twice changes nothing.
            self._first = False
            yield
        elif self.inside_forward:
            self._local = True
            try:
                yield
            finally:
                self._local = False
        else:
            with self._ddp.no_sync():
                yield

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self.world_size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        used = self.reduce(
            torch.tensor([float(parameter.grad is not None) for parameter in trained]),
            "max",
        )
        buckets: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        numbers = 0
        for parameter, somewhere in zip(trained, used.tolist(), strict=True):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                numbers += parameter.numel()
                buckets.setdefault((parameter.dtype, numbers // _BUCKET), []).append(
                    parameter.grad
                )
        for gradients in buckets.values():
            means = self.reduce(
                torch.cat([gradient.flatten() for gradient in gradients])
            )
            for gradient, mean in zip(
                gradients, means.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(mean.view_as(gradient))

    def start_evaluation(self) -> None:
        if self._ddp is not None:
            self._ddp.check_gradients()
        if self.world_size > 1 and self.broadcast_buffers:
            # Running statistics are each process's own since the last forward began.
            self.equalize(self.module.buffers())
