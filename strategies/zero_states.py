"""DeepSpeed's ZeRO: optimizer states (stage 1), gradients too (2) and parameters too (3) in parts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .build_locks import await_builds
from .deepspeed_config import check_batches, complete_config, read_config
from .launch.environment import ClusterEnvironment
from .module_policy import Policy, checkpoint_activations
from .optimizer_state import number_optimizer_state, parameter_names
from .precision import Precision
from .process_group import ProcessGroupStrategy
from .step_module import StepModule
from .tensor_shards import TensorShard, full_state

# Optimizers that treat each number by itself.
_ELEMENTWISE = {
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
}

# What DeepSpeed's dynamic loss scale goes by, and changes.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

_ENGINE = "_deepspeed_engine"  # in a module's __dict__: DeepSpeed's, which keeps its parameters


class DeepSpeedStrategy(ProcessGroupStrategy):
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
        process_group_backend: such as ``"gloo"``; by default the device's own, with gloo beside it for the CPU.
        timeout: how long a collective waits for the slowest process before the run is given up.
        max_restarts: how often processes that we started are started again when one fails.

    Raises:
        ImportError: if deepspeed is not installed.
        ValueError: if the arguments contradict each other, or the configuration the Trainer.
    """

    shards_state = True
    owns_loss_scale = True
    manual_optimization = False
    one_module = True

    def __init__(
        self,
        stage: int | None = None,
        *,
        config: dict[str, Any] | str | os.PathLike[str] | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        activation_checkpointing: Policy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        max_restarts: int = 0,
    ) -> None:
        super().__init__(process_group_backend, timeout, max_restarts)
        if find_spec("deepspeed") is None:
            raise ImportError(
                "this strategy needs DeepSpeed: pip install loopwright[deepspeed]"
            )
        self.config, self.stage = read_config(config, stage)
        if offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters=True needs stage=3; got stage={self.stage}"
            )
        self.offload_optimizer, self.offload_parameters = (
            offload_optimizer,
            offload_parameters,
        )
        self.activation_checkpointing = activation_checkpointing
        self.name = f"deepspeed_stage_{self.stage}"
        self.equal_forwards = self.stage == 3
        self._engine: Any = None  # DeepSpeed's
        self._trains = False  # whether it has an optimizer
        self._trained: tuple[Any, ...] = ()  # what it trains
        self._frozen: dict[str, Tensor] = {}  # what it does not, if it rounds that
        self._complete: dict[str, Any] = {}  # its configuration
        self._names: list[list[str]] = []  # of the optimizer's parameters, by group
        self._offloaded: list[
            tuple[Tensor, Tensor]
        ] = []  # what the optimizer steps on, and its gradient's memory
        clip = self.config.get("gradient_clipping", "auto")
        self._clip = self._own_clip = 0.0 if clip == "auto" else float(clip)
        self._factor: Any = None  # for the gradients of the next step
        self._linear: tuple[Any, Any] = (
            None,
            None,
        )  # nn.functional.linear, and what DeepSpeed replaces it by

    def setup_environment(
        self,
        devices: list[torch.device],
        num_nodes: int,
        environment: ClusterEnvironment | None,
    ) -> None:
        super().setup_environment(devices, num_nodes, environment)
        # DeepSpeed takes the best device that it finds, unless it is told.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed reads it

    def connect(self) -> None:
        super().connect()
        await_builds()
        self.connect_alone()  # DeepSpeed needs a process group for one process, too

    def check_steps(
        self,
        batch_size: int | None,
        accumulate: int,
        clip: float | None,
        algorithm: str | None,
    ) -> None:
        self._check_clipping(algorithm if clip else "norm", 2.0)
        check_batches(self.config, batch_size, accumulate, self.world_size, clip)

    # -- the module -------------------------------------------------------------------------------------------

    @property
    def is_transparent(self) -> bool:
        return False

    @contextmanager
    def init_context(self, precision: Precision) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        with (
            self._own_linear(),
            deepspeed.zero.Init(config_dict_or_path=complete_config(self, precision)),
        ):
            yield

    @contextmanager
    def _own_linear(self) -> Iterator[None]:
        """In it, ``nn.functional.linear`` is DeepSpeed's, if that replaces torch's (stage 3); after it, what it was."""
        before = nn.functional.linear
        if before is self._linear[0]:
            nn.functional.linear = self._linear[1]
        try:
            yield
        finally:
            now = nn.functional.linear
            if now is not before and getattr(now, "__module__", "").startswith(
                "deepspeed."
            ):
                self._linear, nn.functional.linear = (before, now), before

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        self._complete = complete_config(self, precision)
        self._context = precision.forward_context(self.device)
        self._mixed = precision.compute is not None
        if self._trains and self.module is module:
            return module  # until a fit takes new optimizers, what it has trained stays, and goes on
        _release(module)
        self._engine, self._trains, self.module = None, False, module
        partitioned = any(
            hasattr(parameter, "ds_id") for parameter in module.parameters()
        )
        if not partitioned:
            precision.convert_module(module)
            module.to(self.device)
            if self.world_size > 1:
                self.equalize((*module.parameters(), *module.buffers()))
        checkpoint_activations(module, self.activation_checkpointing)
        return module

    def _initialize(self, optimizer: Optimizer | None) -> Any:
        import deepspeed

        with self._own_linear():
            engine, *_ = deepspeed.initialize(
                model=StepModule(self.module, self._context),
                optimizer=optimizer,
                config=self._complete,
            )
        vars(self.module)[_ENGINE] = engine
        return engine

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        if len(optimizers) != 1:
            raise ValueError(
                f"strategy={self.name!r} trains with one optimizer; got {len(optimizers)}"
            )
        (optimizer,) = optimizers
        kind = type(optimizer)
        known = kind.__name__ in _ELEMENTWISE or kind.__module__.startswith(
            "deepspeed."
        )
        if not known and not self.config.get("zero_allow_untested_optimizer"):
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
        _release(self.module)
        self._names = parameter_names(self.module, optimizer)
        self._trained = self._trainable()
        for parameter in self.module.parameters():
            parameter.grad = None  # what was left would count in the first step
        # DeepSpeed rounds what it does not train, too.
        rounded = (
            self.module.named_parameters() if self._mixed and self.stage != 3 else ()
        )
        self._frozen = {
            name: p.detach().clone() for name, p in rounded if not p.requires_grad
        }
        self._engine, self._trains = self._initialize(optimizer), True
        self._offloaded = [
            (flat, flat.grad)
            for flat in getattr(self._zero, "single_partition_of_fp32_groups", ())
            if flat.grad is not None
        ]
        return super().setup_optimizers(optimizers)

    def _trainable(self) -> tuple[Any, ...]:
        return tuple(
            name
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        )

    def start_epoch(self) -> None:
        if not self._trains:
            return
        groups = len(self._zero.optimizer.param_groups), len(self._names)
        if changed := set(self._trainable()) ^ set(self._trained):
            raise RuntimeError(
                f"strategy={self.name!r} cannot change which parameters are trained during a fit; frozen or unfrozen "
                f'since it began: {", ".join(sorted(changed))}. strategy="fsdp" and "ddp" can'
            )
        if groups[0] != groups[1]:
            raise RuntimeError(
                f"strategy={self.name!r} cannot add parameter groups during a fit: {groups[1]} then, {groups[0]} now"
            )

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around the user's."""
        return self._engine.optimizer

    def teardown(self) -> None:
        if self.failed or not self._trains or self.stage == 3:
            return
        if self._mixed:  # the module has what was trained in half precision only
            state = full_state(self, self.model_state())
            for name, parameter in self.module.named_parameters():
                parameter.data = state[name].to(parameter.device)

    # -- steps ------------------------------------------------------------------------------------------------

    def forward(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self._engine is None:
            self._engine = self._initialize(None)
        with self._own_linear():
            return self._engine(step_name, *args, **kwargs)

    def evaluate(self, step_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 3:
            return self.forward(step_name, *args, **kwargs)
        return super().evaluate(step_name, *args, **kwargs)

    def start_evaluation(self) -> None:
        if self.world_size > 1:
            self.equalize(
                self.module.buffers()
            )  # running statistics are each process's own

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for flat, memory in self._offloaded:
            flat.grad = (
                memory  # which clearing the optimizer's gradients has taken away
            )
        with self._own_linear():  # for activations that are computed again
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
        parameters: Iterable[Tensor],
        value: float,
        algorithm: str,
        norm: float = 2.0,
    ) -> Any:
        """Let the next step clip: DeepSpeed does it there."""
        self._check_clipping(algorithm, norm)
        self._clip = value

    def _check_clipping(self, algorithm: str | None, norm: float) -> None:
        if algorithm not in (None, "norm") or norm != 2.0:
            raise ValueError(
                f'strategy={self.name!r} clips by the 2-norm (gradient_clip_algorithm="norm"); got '
                f"gradient_clip_algorithm={algorithm!r}, norm={norm}"
            )

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        self._factor = float(factor)

    def step(self, optimizer: Optimizer) -> Any:
        zero, scaler = self._zero, self._zero.loss_scaler
        zero.clip_grad = self._clip
        if self._factor:
            # Gradients are divided by the loss scale in the step.
            scaler.cur_scale /= self._factor
        self._engine.step()
        if self._factor:
            scaler.cur_scale *= self._factor
        self._clip, self._factor = self._own_clip, None
        self.step_was_skipped = bool(zero.overflow)

    # -- states -----------------------------------------------------------------------------------------------

    def _zero_state(self) -> list[tuple[Tensor, list[Any]]]:
        """What the optimizer steps on, and the parameters of which it is made."""
        if self.stage == 3:
            return list(
                zip(
                    self._zero.fp32_partitioned_groups_flat,
                    self._zero.fp16_groups,
                    strict=True,
                )
            )
        return list(
            zip(
                self._zero.single_partition_of_fp32_groups,
                self._zero.bit16_groups,
                strict=True,
            )
        )

    def _piece(self, parameter: Any, key: str | None = None) -> TensorShard | None:
        """What this process trains of a parameter, or its optimizer state ``key``; None if it is not spread."""
        if hasattr(parameter, "ds_id"):
            # Without an optimizer, as in evaluation, DeepSpeed's engine has another object in its place.
            trained = parameter.requires_grad and self._trains
            local = (
                self._zero.get_local_fp32_param(parameter, key)
                if trained
                else parameter.ds_tensor
            )
            start = (
                self.global_rank * parameter.ds_tensor.ds_numel
            )  # the last ones are padded
            count = max(0, min(local.numel(), parameter.ds_numel - start))
            return TensorShard(
                local.detach().flatten()[:count],
                tuple(parameter.ds_shape),
                start,
                count > 0,
            )
        if not self._trains or not hasattr(parameter, "_hp_mapping"):
            return None
        mapping = parameter._hp_mapping
        if mapping is None:  # others train all of it
            return TensorShard(
                torch.empty(0), tuple(parameter.shape), 0, is_owner=False
            )
        return TensorShard(
            mapping.get_hp_fragment(key),
            tuple(parameter.shape),
            mapping.lp_fragment_address.start,
        )

    def model_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        for name, value in state.items():
            if isinstance(value, Tensor):
                piece = self._piece(value)
                state[name] = (
                    self._frozen.get(name, value.detach()) if piece is None else piece
                )
        return state

    def load_model_state(self, state: dict[str, Any], strict: bool) -> Any:
        spread = {
            name: own
            for name, own in self.module.state_dict(keep_vars=True).items()
            if hasattr(own, "ds_id")
        }
        for name in spread.keys() & state.keys():
            self._set(spread[name], state[name], name)
        if not spread:
            result = self.module.load_state_dict(state, strict=strict)
            parameter: Any
            for parameter in self.module.parameters():
                if self._trains and getattr(parameter, "_hp_mapping", None) is not None:
                    parameter._hp_mapping.update_hp()
            return result
        # Parameters in parts look empty to torch: it takes the rest, and says what is missing.
        stand_in = {
            **state,
            **{name: own.detach() for name, own in spread.items() if name in state},
        }
        return self.module.load_state_dict(stand_in, strict=strict)

    def _set(
        self, parameter: Any, whole: Tensor, name: str, key: str | None = None
    ) -> None:
        """Give this process its part of a parameter, or of the optimizer state ``key``."""
        piece = self._piece(parameter, key)
        assert piece is not None
        if whole.shape != piece.shape:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(whole.shape)} in the checkpoint, {piece.shape} in the module"
            )
        if not piece.is_owner:
            return
        if not hasattr(parameter, "ds_id"):
            piece.tensor.copy_(piece.slice_of(whole))
            return
        part = torch.zeros_like(
            parameter.ds_tensor, dtype=whole.dtype
        )  # with the padding of the last one
        part[: piece.tensor.numel()].copy_(piece.slice_of(whole))
        if key is None:
            parameter.ds_tensor.data.copy_(part)
        if (
            parameter.requires_grad and self._trains
        ):  # what is read of an offloaded one is a copy on the device
            self._zero.set_local_hp_param(part, parameter, key)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        names = {
            id(parameter): name for name, parameter in self.module.named_parameters()
        }
        found: dict[str, Any] = {}
        for flat, parameters in self._zero_state():
            state = self._zero.optimizer.state.get(flat) or {}
            self._link(state)
            for parameter in parameters:
                if state:
                    found[names[id(parameter)]] = {
                        # Elsewhere each parameter has a step count of its own.
                        key: self._piece(parameter, key)
                        if _is_spread(value, flat)
                        else copy.deepcopy(value)
                        for key, value in state.items()
                    }
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": own,
            }
            for group, own in zip(optimizer.param_groups, self._names, strict=True)
        ]
        scaler = self._zero.loss_scaler
        scale = (
            {"loss_scale": {name: getattr(scaler, name) for name in _LOSS_SCALE}}
            if scaler.dynamic
            else {}
        )
        return {"state": found, "param_groups": groups, **scale}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        number_optimizer_state(state, self._names)  # raises if it is another's
        names = {
            id(parameter): name for name, parameter in self.module.named_parameters()
        }
        for flat, parameters in self._zero_state():
            own = {
                names[id(p)]: (p, state["state"].get(names[id(p)]) or {})
                for p in parameters
            }
            first = next(
                ((parameter, values) for parameter, values in own.values() if values),
                None,
            )
            if first is None:
                continue
            like, shared = first
            self._check_alike(own, shared)
            self._zero.optimizer.state[flat] = {
                key: torch.zeros_like(flat)
                if _is_spread(value, like)
                else copy.deepcopy(value)
                for key, value in shared.items()
            }
            self._link(True)
            for name, (
                parameter,
                values,
            ) in own.items():  # one that was never stepped has none: zeros
                for key, value in values.items():
                    if _is_spread(self._zero.optimizer.state[flat][key], flat):
                        self._set(parameter, value, name, key)
        for group, saved in zip(
            optimizer.param_groups, state["param_groups"], strict=True
        ):
            group.update(
                {key: value for key, value in saved.items() if key != "params"}
            )
        if self._zero.loss_scaler.dynamic:
            vars(self._zero.loss_scaler).update(state.get("loss_scale", {}))

    def _check_alike(
        self, own: dict[str, tuple[Any, dict[str, Any]]], shared: dict[str, Any]
    ) -> None:
        """Refuse a state that differs between parameters where DeepSpeed has one for all: the count of steps."""
        for name, (parameter, values) in own.items():
            for key, value in values.items():
                if not _is_spread(value, parameter) and not torch.equal(
                    *map(torch.as_tensor, (value, shared[key]))
                ):
                    raise ValueError(
                        f"{name} has {key}={value}, another parameter of its group {shared[key]}: "
                        f"strategy={self.name!r} has one for all of them"
                    )

    def _link(self, has_state: Any) -> None:
        """Let each parameter know its part of the optimizer's state: DeepSpeed does so once, for the first group."""
        if has_state and self.stage != 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()


def _release(module: nn.Module) -> None:
    """Let an earlier engine give a module back, but for the parameters that it has in parts."""
    if (before := vars(module).pop(_ENGINE, None)) is not None:
        before.destroy()


def _is_spread(value: Any, like: Any) -> bool:
    """Whether an optimizer's state is as large as what it belongs to."""
    return (
        isinstance(value, Tensor)
        and value.numel() == getattr(like, "ds_numel", like.numel())
        and value.dim() > 0
    )
