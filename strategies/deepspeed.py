"""DeepSpeed's ZeRO: sharded optimizer states (stage 1), gradients too (2) and parameters too (3)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import Strategy
from .build_locks import await_builds
from .capabilities import Capabilities
from .deepspeed_config import check_batches, complete_config, read_config
from .launch.rendezvous import timing_out
from .module_policy import Policy, checkpoint_activations
from .optimizer_state import State, parameter_names
from .precision import Precision
from .process_group import ProcessGroupOptions
from .step_module import StepModule
from .tensor_shards import TensorPairs, full_state
from .zero_states import ZeroStates

# Optimizers that treat each number of a parameter by itself, whatever its shape: DeepSpeed hands them flat tensors.
ELEMENTWISE_OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)

# The key of DeepSpeed's engine, which keeps a module's parameters, in the module's __dict__.
_ENGINE = "_deepspeed_engine"


class DeepSpeedStrategy(Strategy):
    """Trains by DeepSpeed's ZeRO (``pip install loopwright[deepspeed]``).

    DeepSpeed's configuration follows from the Trainer's arguments; ``config`` may add to it. Accumulation, clipping,
    schedulers and checkpoints are Loopwright's, so they are those of the other strategies. Each process saves its own
    part of a checkpoint. In stage 3, evaluation takes the same number of forwards in all processes: one that has no
    batch left runs its last one again, which counts nothing. An accumulation window cannot end early.

    Args:
        stage: 1, 2 or 3 (default: what ``config`` says, else 2).
        config: more of DeepSpeed's configuration: a dict, or the path of a JSON file.
        offload_optimizer: keep optimizer states, and step, in the host's memory.
        offload_parameters: keep parameters in the host's memory; in stage 3.
        activation_checkpointing: which submodules compute their activations again in the backward pass: classes or a
            function.
        process_group_backend: see :class:`~.process_group.ProcessGroupOptions`, as for the two that follow.
        timeout: how long a collective waits for the slowest process.
        max_restarts: how often processes are started again when one fails.

    Raises:
        ImportError: if deepspeed is not installed.
        ValueError: if the arguments contradict each other, or the configuration the Trainer.
    """

    def __init__(
        self,
        stage: int | None = None,
        *,
        config: dict[str, Any] | str | os.PathLike[str] | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        activation_checkpointing: Policy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = ProcessGroupOptions.timeout,
        max_restarts: int = ProcessGroupOptions.max_restarts,
    ) -> None:
        self.group_options = ProcessGroupOptions(
            process_group_backend, timeout, max_restarts, for_one_process=True
        )
        if find_spec("deepspeed") is None:
            raise ImportError(
                "this strategy needs DeepSpeed: pip install loopwright[deepspeed]"
            )
        self.config, self.stage = read_config(config, stage)
        if offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters=True needs stage=3; got stage={self.stage}"
            )
        self.offload_optimizer = offload_optimizer
        self.offload_parameters = offload_parameters
        self.activation_checkpointing = activation_checkpointing
        self.name = f"deepspeed_stage_{self.stage}"
        self.capabilities = Capabilities(
            needs_equal_forwards=self.stage == 3,
            shards_state=True,
            owns_loss_scale=True,
            single_module=True,
            undoes_steps=False,
            has_plain_tensors=False,
        )
        # The configuration with what follows from the Trainer's arguments.
        self._complete_config: dict[str, Any] = {}
        # DeepSpeed's engine around the module: from setup_optimizers on, or, without optimizers, from the first step.
        self._engine: Any = None
        self._states = ZeroStates(nn.Module(), self.stage, rank=0)
        # With optimizer states in the host's memory: the flat tensors that are stepped there, and their gradients.
        self._offloaded: list[tuple[Tensor, Tensor]] = []
        # The maximal norm of the next step's gradients, 0 for none, and by what to multiply them.
        self._clip_norm = self._configured_clip_norm()
        self._gradient_factor: float | None = None
        self._linear = _LinearSwitch()

    def _configured_clip_norm(self) -> float:
        clip = self.config.get("gradient_clipping", "auto")
        return 0.0 if clip == "auto" else float(clip)

    def check_group(self) -> None:
        # Unless it is told by variables, DeepSpeed takes the best device that it finds.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

    def connect(self) -> None:
        if self.world_size == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f'strategy={self.name!r} cannot run by itself in one of several processes: use strategy="single"'
            )
        super().connect()
        await_builds()

    def check_steps(
        self,
        batch_size: int | None,
        accumulate: int,
        clip: float | None,
        algorithm: str | None,
    ) -> None:
        self._check_clipping(algorithm if clip else "norm", 2.0)
        check_batches(self.config, batch_size, accumulate, self.world_size, clip)

    @property
    def is_transparent(self) -> bool:
        return False

    @contextmanager
    def init_context(self, precision: Precision) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        config = complete_config(self, precision)
        with self._linear.context(), deepspeed.zero.Init(config_dict_or_path=config):
            yield

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        self._complete_config = complete_config(self, precision)
        self._context = precision.forward_context(self.device)
        self._mixed = precision.compute is not None
        if self._is_training and self.module is module:
            # A module that is evaluated after its fit is not released: DeepSpeed's optimizer has its full precision.
            return module
        _release(module)
        self._engine = None
        self.module = module
        self._states = ZeroStates(module, self.stage, self.global_rank)
        is_partitioned = any(hasattr(p, "ds_id") for p in module.parameters())
        if not is_partitioned:
            precision.convert_module(module)
            module.to(self.device)
            self.group.broadcast_tensors((*module.parameters(), *module.buffers()))
        checkpoint_activations(module, self.activation_checkpointing)
        return module

    @property
    def _is_training(self) -> bool:
        """Whether DeepSpeed's engine has an optimizer."""
        return self._states.zero is not None

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around the user's."""
        return self._states.zero

    def _initialize(self, optimizer: Optimizer | None) -> Any:
        import deepspeed

        with self._linear.context(), timing_out(self.group_options.timeout):
            engine, *_ = deepspeed.initialize(
                model=StepModule(self.module, self._context),
                optimizer=optimizer,
                config=self._complete_config,
            )
        vars(self.module)[_ENGINE] = engine
        return engine

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        if len(optimizers) != 1:
            kinds = " and ".join(type(each).__name__ for each in optimizers) or "none"
            raise ValueError(
                f"strategy={self.name!r} trains with one optimizer, as DeepSpeed steps one; got {kinds}: "
                'use strategy="fsdp" or "ddp"'
            )
        optimizer = optimizers[0]
        self._check_optimizer(optimizer)
        _release(self.module)
        names = parameter_names(self.module, optimizer)
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            # A gradient that is left over would count in the first step.
            parameter.grad = None
            # DeepSpeed converts frozen parameters to half precision, too; the checkpoint is to have what they were.
            if self._mixed and self.stage != 3 and not parameter.requires_grad:
                frozen[name] = parameter.detach().clone()
        self._engine = self._initialize(optimizer)
        zero = self._engine.optimizer
        self._states = ZeroStates(
            self.module, self.stage, self.global_rank, zero, names, frozen
        )
        self._offloaded = [
            (flat, flat.grad)
            for flat in getattr(zero, "single_partition_of_fp32_groups", ())
            if flat.grad is not None
        ]
        return super().setup_optimizers(optimizers)

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that DeepSpeed cannot step.

        Raises:
            ValueError: with what it lacks.
        """
        kind = type(optimizer)
        is_known = (
            kind.__name__ in ELEMENTWISE_OPTIMIZERS
            or kind.__module__.startswith("deepspeed.")
            or self.config.get("zero_allow_untested_optimizer")
        )
        if not is_known:
            raise ValueError(
                f"strategy={self.name!r} gives an optimizer flat parts of all parameters together, and whether "
                f"{kind.__name__} looks at their shapes is not known (as Adafactor and Muon do): if it treats each "
                'number by itself, pass DeepSpeedStrategy(config={"zero_allow_untested_optimizer": True})'
            )
        if optimizer.state:
            raise ValueError(
                f"strategy={self.name!r} takes an optimizer that has no state yet; this {kind.__name__} has stepped: "
                "prepare it before its first step, or load its state by load_state"
            )
        for index, group in enumerate(optimizer.param_groups):
            if not any(parameter.requires_grad for parameter in group["params"]):
                raise ValueError(
                    f"strategy={self.name!r}: no parameter of the optimizer's group {index} is trained"
                )

    def start_epoch(self) -> None:
        if not self._is_training:
            return
        changed = self._states.trainable_names() ^ self._states.trained
        if changed:
            raise RuntimeError(
                f"strategy={self.name!r} cannot change which parameters are trained during a fit; frozen or unfrozen "
                f'since it began: {", ".join(sorted(changed))}. strategy="fsdp" and "ddp" can'
            )
        num_groups = len(self._zero.optimizer.param_groups)
        num_groups_before = len(self._states.names)
        if num_groups != num_groups_before:
            raise RuntimeError(
                f"strategy={self.name!r} cannot add parameter groups during a fit: {num_groups_before} then, "
                f"{num_groups} now"
            )

    def teardown(self, interrupted: bool = False) -> None:
        if interrupted or not self._is_training or self.stage == 3 or not self._mixed:
            return
        # The module itself holds the trained parameters in half precision; the full precision is in DeepSpeed's shards.
        state = full_state(self, self.model_state())
        for name, parameter in self.module.named_parameters():
            parameter.data = state[name].to(parameter.device)

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self._engine is None:
            self._engine = self._initialize(None)
        with self._linear.context():
            return self._engine(step_name, *args, **kwargs)

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 3:
            return self.forward(step_name, *args, **kwargs)
        return super().evaluate(step_name, *args, **kwargs)

    def start_evaluation(self) -> None:
        # Running statistics of batch norms, and other buffers, differ between processes after training.
        self.group.broadcast_tensors(tuple(self.module.buffers()))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for flat, gradient in self._offloaded:
            # zero_grad has set it to None, and DeepSpeed writes into the tensor that it has made once.
            flat.grad = gradient
        # With activation checkpointing, the backward pass calls nn.functional.linear again.
        with self._linear.context():
            self._engine.backward(loss, *args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        if self._engine is None:
            yield
            return
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        raise RuntimeError(
            f"strategy={self.name!r} cannot end an accumulation window early: it averages gradients in the backward "
            "pass of the window's last batch. Leave an epoch between windows, or use accumulate_grad_batches=1"
        )

    def clip_gradients(
        self,
        params: Iterable[Tensor],
        value: float,
        algorithm: str,
        norm: float = 2.0,
    ) -> Any:
        """Let the next step clip, as DeepSpeed clips there; returns None, as the norm is not known yet."""
        self._check_clipping(algorithm, norm)
        self._clip_norm = value

    def _check_clipping(self, algorithm: str | None, norm: float) -> None:
        if algorithm not in (None, "norm") or norm != 2.0:
            raise ValueError(
                f'strategy={self.name!r} clips by the 2-norm (gradient_clip_algorithm="norm"); got '
                f"gradient_clip_algorithm={algorithm!r}, norm={norm}"
            )

    def gradient_norm(self, params: Iterable[Tensor]) -> Any:
        return None if self._engine is None else self._engine.get_global_grad_norm()

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Let the next step scale: the gradients are in DeepSpeed's memory."""
        self._gradient_factor = float(factor)

    def step(self, optimizer: Optimizer) -> Any:
        zero = self._zero
        zero.clip_grad = self._clip_norm
        factor = self._gradient_factor
        if factor:
            # The step divides gradients by the loss scale, so a smaller scale multiplies them.
            zero.loss_scaler.cur_scale /= factor
        self._engine.step()
        if factor:
            zero.loss_scaler.cur_scale *= factor
        self._clip_norm = self._configured_clip_norm()
        self._gradient_factor = None
        self.step_was_skipped = bool(zero.overflow)

    def model_state(self) -> State:
        return self._states.model_state()

    def load_model_state(self, state: State, strict: bool) -> Any:
        return self._states.load_model_state(state, strict)

    def local_part(self, tensor: Tensor) -> Tensor:
        return self._states.local_part(tensor)

    def evaluated_part(self, tensor: Tensor, value: Tensor) -> TensorPairs:
        return self._states.evaluated_part(tensor, value, self)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        return self._states.optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        self._states.load_optimizer_state(optimizer, state)


def _release(module: nn.Module) -> None:
    """Let the DeepSpeed engine of an earlier run give a module back; partitioned parameters stay partitioned."""
    engine = vars(module).pop(_ENGINE, None)
    if engine is not None:
        engine.destroy()


class _LinearSwitch:
    """Confines DeepSpeed's ``nn.functional.linear`` of stage 3, which it puts in place for good, to a context."""

    def __init__(self) -> None:
        self._original: Any = None
        self._replacement: Any = None

    @contextmanager
    def context(self) -> Iterator[None]:
        """Return a context with DeepSpeed's function, if it has one; after it, the function is what it was."""
        before = nn.functional.linear
        if before is self._original:
            nn.functional.linear = self._replacement
        try:
            yield
        finally:
            now = nn.functional.linear
            is_deepspeeds = getattr(now, "__module__", "").startswith("deepspeed.")
            if now is not before and is_deepspeeds:
                self._original = before
                self._replacement = now
                nn.functional.linear = before
