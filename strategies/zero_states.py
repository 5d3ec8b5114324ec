"""The states of a module under DeepSpeed's ZeRO: its parameters', and its optimizer's, by name and in shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizer_state import State, check_same_parameters, with_params
from .stored_tensors import StoredTensor, filled, stored_items
from .tensor_shards import TensorPairs, TensorShard, full_state

if TYPE_CHECKING:
    from .base import Strategy

# What DeepSpeed's dynamic loss scale goes by, and changes.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class ZeroStates:
    """Reads and writes what DeepSpeed has of a module's parameters and their optimizer states.

    In stage 3 a parameter is partitioned: it has a ``ds_id``, and its ``ds_tensor`` is this process's shard. In stages
    1 and 2 all processes have the whole parameter, and each one trains a fragment of it in full precision, which the
    parameter's ``_hp_mapping`` leads to. The optimizer steps on flat tensors, each made of many parameters' shards.

    Attributes:
        module: the user's.
        stage: of ZeRO.
        rank: of this process.
        zero: DeepSpeed's optimizer around the user's; None as long as the module is not trained.
        names: of the optimizer's parameters, by parameter group.
        frozen: parameters that are not trained, by name, as they were before DeepSpeed rounded them.
    """

    module: nn.Module
    stage: int
    rank: int
    zero: Any = None
    names: list[list[str]] = field(default_factory=list)
    frozen: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = self.trainable_names()
        self.name_of = {value: name for name, value in self.module.named_parameters()}

    def trainable_names(self) -> set[str]:
        """Return the names of the parameters that require a gradient now; ``trained`` holds those of the beginning."""
        parameters = self.module.named_parameters()
        return {name for name, parameter in parameters if parameter.requires_grad}

    def model_state(self) -> State:
        """Return parameters and buffers by name, a :class:`TensorShard` for each that is sharded."""
        state: State = self.module.state_dict(keep_vars=True)
        for name, value in state.items():
            if isinstance(value, Tensor):
                shard = self._shard_of(value)
                if shard is None:
                    shard = self.frozen.get(name, value.detach())
                state[name] = shard
        return state

    def load_model_state(self, state: State, strict: bool) -> Any:
        """Load whole tensors; returns what ``nn.Module.load_state_dict`` does."""
        current = self.module.state_dict(keep_vars=True)
        partitioned = {
            name: value for name, value in current.items() if hasattr(value, "ds_id")
        }
        if not partitioned:
            state = filled(state, self.module)
            result = self.module.load_state_dict(state, strict=strict)
            if self.zero is not None:
                self._update_fragments()
            return result
        # Small ones that have been gathered once stay so: let the next forward gather what is loaded now.
        gathered = getattr(self.zero, "persistent_parameters", ())
        if gathered:
            gathered[0].partition(gathered)
        # Partitioned parameters look empty to torch. They are loaded here; torch gets them as they are, loads the rest,
        # and says what is missing.
        for_torch = dict(stored_items(state))
        for name, parameter in partitioned.items():
            if name in state:
                self._load_shard(parameter, for_torch[name], name)
                for_torch[name] = parameter.detach()
        for_torch = filled(for_torch, self.module)
        return self.module.load_state_dict(for_torch, strict=strict)

    def local_part(self, tensor: Any) -> Tensor:
        """Return this process's shard of a parameter; all of what is not sharded."""
        shard = self._shard_of(tensor)
        return tensor.data if shard is None else shard.tensor

    def evaluated_part(
        self, tensor: Any, value: Tensor, strategy: Strategy
    ) -> TensorPairs:
        """Return what a forward reads of a parameter, and ``value``, a shard of another one, in its form.

        That is not the shard that is trained: a forward reads a rounded copy of it. A collective.

        Args:
            tensor: the parameter or buffer.
            value: a new value of :meth:`local_part`.
            strategy: to put the shards of all processes together.
        """
        shard = self._shard_of(tensor)
        if shard is None:
            return [(tensor.data, value)]
        is_partitioned = hasattr(tensor, "ds_id")
        pairs = []
        if is_partitioned:
            pairs.append((tensor.ds_tensor.data[: value.numel()], value))
        # DeepSpeed leaves small parameters together.
        if not is_partitioned or tensor.data.shape == shard.shape:
            whole = full_state(strategy, replace(shard, tensor=value))
            pairs.append((tensor.data, whole))
        return pairs

    def _update_fragments(self) -> None:
        parameter: Any
        for parameter in self.module.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.update_hp()

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """Return the optimizer's state by parameter names, and the loss scale if it is dynamic."""
        by_name: State = {}
        for flat, parameters in self._flat_groups():
            state = self.zero.optimizer.state.get(flat)
            if not state:
                continue
            self._link_states()
            for parameter in parameters:
                by_name[self.name_of[parameter]] = {
                    # DeepSpeed has one step count for a group; other strategies, one for each parameter.
                    key: self._shard_of(parameter, key)
                    if _is_elementwise(value, flat)
                    else copy.deepcopy(value)
                    for key, value in state.items()
                }
        groups = with_params(optimizer.param_groups, self.names)
        saved = {"state": by_name, "param_groups": groups}
        scaler = self.zero.loss_scaler
        if scaler.dynamic:
            saved["loss_scale"] = {name: getattr(scaler, name) for name in _LOSS_SCALE}
        return saved

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """Load what :meth:`optimizer_state` returned, of any strategy.

        Raises:
            ValueError: if it is that of other parameters, or differs where DeepSpeed has one for all of a group.
        """
        check_same_parameters(state["param_groups"], self.names)
        for flat, parameters in self._flat_groups():
            by_parameter = {
                parameter: state["state"].get(self.name_of[parameter]) or {}
                for parameter in parameters
            }
            self._load_flat_group(flat, by_parameter)
        for group, saved in zip(
            optimizer.param_groups, state["param_groups"], strict=True
        ):
            options = {key: value for key, value in saved.items() if key != "params"}
            group.update(options)
        if self.zero.loss_scaler.dynamic:
            vars(self.zero.loss_scaler).update(state.get("loss_scale", {}))

    def _load_flat_group(self, flat: Tensor, by_parameter: dict[Any, State]) -> None:
        """Load the states of the parameters of which ``flat`` is made."""
        # A parameter that was never stepped has no state. In the flat tensors, zeros stand for it.
        stepped = [(p, values) for p, values in by_parameter.items() if values]
        if not stepped:
            self.zero.optimizer.state.pop(flat, None)
            return
        like, shared = stepped[0]
        self._check_alike(by_parameter, shared)
        flat_state = {}
        for key, value in stored_items(shared).items():
            if _is_elementwise(value, like):
                flat_state[key] = torch.zeros_like(flat)
            else:
                flat_state[key] = copy.deepcopy(shared[key])
        self.zero.optimizer.state[flat] = flat_state
        self._link_states()
        for parameter, values in by_parameter.items():
            for key, value in stored_items(values).items():
                if _is_elementwise(flat_state[key], flat):
                    self._load_shard(parameter, value, self.name_of[parameter], key)

    def _check_alike(self, by_parameter: dict[Any, State], shared: State) -> None:
        """Refuse a state that differs between parameters where DeepSpeed has one for all: the count of steps."""
        for parameter, values in by_parameter.items():
            for key, stored in stored_items(values).items():
                if _is_elementwise(stored, parameter):
                    continue
                value = values[key]
                if not torch.equal(
                    torch.as_tensor(value), torch.as_tensor(shared[key])
                ):
                    raise ValueError(
                        f"{self.name_of[parameter]} has {key}={value}, another parameter of its group {shared[key]}: "
                        f'strategy="deepspeed_stage_{self.stage}" has one for all of them'
                    )

    def _flat_groups(self) -> Iterator[tuple[Tensor, list[Any]]]:
        """Pairs of a flat tensor on which the optimizer steps, and the parameters of which it is made."""
        zero = self.zero
        if self.stage == 3:
            return zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)

    def _link_states(self) -> None:
        """Let each parameter know its part of the optimizer's state: DeepSpeed does so once, for the first group."""
        if self.stage != 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _shard_of(self, parameter: Any, key: str | None = None) -> TensorShard | None:
        """Return what this process trains of a parameter, or of its optimizer state ``key``; None if all of it."""
        if hasattr(parameter, "ds_id"):
            local = parameter.ds_tensor
            # Without an optimizer, as in evaluation, there is no shard in full precision beside this one.
            if parameter.requires_grad and self.zero is not None:
                local = self.zero.get_local_fp32_param(parameter, key)
            offset = self.rank * parameter.ds_tensor.ds_numel
            # The shards of the last ranks are padded.
            size = max(0, min(local.numel(), parameter.ds_numel - offset))
            numbers = local.detach().flatten()[:size]
            return TensorShard(numbers, tuple(parameter.ds_shape), offset, size > 0)
        if self.zero is None or not hasattr(parameter, "_hp_mapping"):
            return None
        shape = tuple(parameter.shape)
        mapping = parameter._hp_mapping
        if mapping is None:
            # Other ranks train all of it.
            return TensorShard(torch.empty(0), shape, 0, is_owner=False)
        offset = mapping.lp_fragment_address.start
        return TensorShard(mapping.get_hp_fragment(key), shape, offset)

    def _load_shard(
        self,
        parameter: Any,
        whole: Tensor | StoredTensor,
        name: str,
        key: str | None = None,
    ) -> None:
        """Load this process's part of a parameter, or of its optimizer state ``key``, from the whole tensor.

        Raises:
            RuntimeError: if the shapes differ.
        """
        shard = self._shard_of(parameter, key)
        assert shard is not None
        if whole.shape != shard.shape:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(whole.shape)} in the checkpoint, {shard.shape} in the module"
            )
        if not shard.is_owner:
            return
        if not hasattr(parameter, "ds_id"):
            shard.load(whole)
            return
        # DeepSpeed takes the shard with its padding.
        padded = torch.zeros_like(parameter.ds_tensor, dtype=whole.dtype)
        padded[: shard.tensor.numel()].copy_(shard.slice_of(whole))
        if key is None:
            parameter.ds_tensor.data.copy_(padded)
        if parameter.requires_grad and self.zero is not None:
            # shard.tensor may be a copy, as that of an offloaded parameter is: DeepSpeed has to write it.
            self.zero.set_local_hp_param(padded, parameter, key)


def _is_elementwise(value: Any, like: Any) -> bool:
    """Whether an optimizer's state has a number for each one of what it belongs to."""
    if not isinstance(value, (Tensor, StoredTensor)) or value.dim() == 0:
        return False
    return value.numel() == getattr(like, "ds_numel", like.numel())
