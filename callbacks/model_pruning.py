"""Prune a model while it is trained: set parts of its weights to zero, and keep them there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .arguments import require
from .base import Callback
from .pruning_methods import (
    has_parameter,
    method_of,
    plain_copy,
    trained,
    zeros_and_size,
)

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

# A module, and the name of one of its parameters.
Prunable = tuple[nn.Module, str]
# What only holds others has nothing of its own to prune.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ModelPruning(Callback):
    """Prune a model by ``torch.nn.utils.prune`` at the end of each epoch.

    A run that resumes goes on with the masks that were there. With several processes, all have those of the first one.
    Sharded parameters (FSDP, DeepSpeed) are refused.

    Args:
        pruning_fn: ``"l1_unstructured"``, ``"random_unstructured"``, ``"ln_structured"``, ``"random_structured"``, or a
            subclass of ``torch.nn.utils.prune.BasePruningMethod``.
        parameters_to_prune: pairs of a submodule and a parameter's name. Default: all that ``parameter_names`` names.
            Override :meth:`filter_parameters_to_prune` to choose among them.
        parameter_names: ``"weight"``, ``"bias"`` or both, the default.
        use_global_unstructured: choose the smallest of all these parameters together, not of each by itself.
        amount: how much to prune each time: a fraction of what is left (float), a number (int), or a function that
            takes the epoch and gives one of these.
        apply_pruning: whether to prune, or a function that takes the epoch and tells.
        make_pruning_permanent: let checkpoints hold the pruned weights in the place of weights and masks, so that they
            load into a model that knows no pruning, and take the masks off when the training ends.
        use_lottery_ticket_hypothesis: set what is left back to its values from before the training after each pruning
            (https://arxiv.org/abs/1803.03635); or a function that takes the epoch and tells.
        resample_parameters: set it to new values instead, by the submodule's ``reset_parameters``.
        pruning_dim: the dimension of whole rows or channels, for the structured ones.
        pruning_norm: the order of the norm by which ``"ln_structured"`` chooses.
        verbose: 1 says how much is pruned, 2 says it for each parameter.
        prune_on_train_epoch_end: False prunes at the end of each validation instead.

    Attributes:
        pruning_fn: what prunes.
        amount: as given.

    Raises:
        ValueError: for arguments that do not fit together; when a run begins, for parameters that the model lacks, or
            a strategy that shards them, or a callback that averages them.
    """

    PARAMETER_NAMES: ClassVar = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: Callable[..., Any] | str,
        parameters_to_prune: Sequence[Prunable] = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: float | Callable[[int], float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        self._parameter_names = parameter_names or self.PARAMETER_NAMES
        for name in self._parameter_names:
            if name not in self.PARAMETER_NAMES:
                raise ValueError(
                    f"parameter_names: {name} isn't in {self.PARAMETER_NAMES}"
                )
        self.pruning_fn, self._options = method_of(
            pruning_fn, use_global_unstructured, pruning_dim, pruning_norm
        )
        self._method_name: str = self.pruning_fn.__name__
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not is_number and not callable(amount):
            raise ValueError(
                f"amount should be provided and be either an int, a float or a function; got {amount!r}"
            )
        require(verbose in (0, 1, 2), "verbose", "any of (0, 1, 2)", verbose)
        self.amount = amount
        self._given = parameters_to_prune
        self._parameters_to_prune = parameters_to_prune
        self._is_global = use_global_unstructured
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        # By the submodule's id: a copy of it from before the training, and the numbers and names of its parameters.
        self._original_layers: dict[int, dict[str, Any]] = {}
        # By full name, what a checkpoint or an earlier fit has left: to be applied when the training begins.
        self._kept: dict[str, dict[str, Tensor]] = {}
        # What is to be pruned by full name, and the hooks on its modules that see weights being loaded.
        self._by_name: dict[str, Prunable] = {}
        self._hooks: list[Any] = []

    @property
    def state_key(self) -> str:
        amount = self.amount if isinstance(self.amount, (int, float)) else "function"
        return f"{super().state_key}[{self._method_name}, amount={amount}]"

    # What a user may override, or call.

    def filter_parameters_to_prune(
        self, parameters_to_prune: Sequence[Prunable] = ()
    ) -> Sequence[Prunable]:
        """Choose what to prune.

        Args:
            parameters_to_prune: pairs of a submodule and a parameter's name.

        Returns:
            Those that are to be pruned; here, all.
        """
        return parameters_to_prune

    def apply_pruning(self, amount: float) -> None:
        """Prune once.

        Args:
            amount: how much.
        """
        before = []
        if self._verbose:
            before = [zeros_and_size(*each) for each in self._parameters_to_prune]
        if self._is_global:
            accepted = inspect.signature(self.pruning_fn).parameters
            options = {"amount": amount, **self._options}
            options = {name: options[name] for name in options if name in accepted}
            prune.global_unstructured(
                self._parameters_to_prune, pruning_method=self.pruning_fn, **options
            )
        else:
            for module, name in self._parameters_to_prune:
                self.pruning_fn(module, name=name, amount=amount, **self._options)
        if self._verbose:
            self._tell(before, amount)

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Set the parameters back to what they were before the training, or to new values; masks stay."""
        for layer in self._original_layers.values():
            original = layer["data"]
            if self._resample_parameters and hasattr(original, "reset_parameters"):
                original = plain_copy(original)
                original.reset_parameters()  # type: ignore[operator] # what has it is asked above
            for number, name in layer["names"]:
                module, _ = self._parameters_to_prune[number]
                with torch.no_grad():
                    trained(module, name).copy_(getattr(original, name))

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Take the masks off a module and its submodules; what they have set to zero stays so.

        Args:
            module: the module.
        """
        for submodule in module.modules():
            for key, hook in list(submodule._forward_pre_hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    hook.remove(submodule)
                    del submodule._forward_pre_hooks[key]

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: nn.Module,
        parameters_to_prune: Sequence[Prunable] = (),
        parameter_names: Sequence[str] = (),
    ) -> Sequence[Prunable]:
        """Check what is to be pruned, or collect it if nothing is given.

        Args:
            pl_module: the model.
            parameters_to_prune: pairs of a submodule and a parameter's name.
            parameter_names: of the parameters to collect.

        Returns:
            Such pairs.

        Raises:
            ValueError: if they are no such pairs, or the model lacks some of them.
        """
        names = parameter_names or ModelPruning.PARAMETER_NAMES
        modules = [
            module
            for module in pl_module.modules()
            if module is not pl_module and not isinstance(module, _CONTAINERS)
        ]
        if not parameters_to_prune:
            return [
                (m, name) for name in names for m in modules if has_parameter(m, name)
            ]
        if not _are_pairs(parameters_to_prune):
            raise ValueError(
                "parameters_to_prune should either be list of tuple (module, name of a parameter), or empty; got "
                f"{parameters_to_prune!r}"
            )
        missing_modules = [m for m, _ in parameters_to_prune if m not in modules]
        missing = [
            name
            for module, name in parameters_to_prune
            if module in modules and not hasattr(module, name)
        ]
        if missing_modules or missing:
            raise ValueError(
                f"parameters_to_prune: the model lacks some of them. Found missing modules: {missing_modules} and "
                f"missing parameters: {missing}"
            )
        return parameters_to_prune

    # The run.

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        can = trainer.strategy.capabilities
        if can.replaces_parameters or can.shards_state:
            raise ValueError(
                f"ModelPruning: strategy={trainer.strategy.name!r} keeps parameters in shards, which "
                'torch.nn.utils.prune cannot mask; use "ddp"'
            )
        averaging = [c for c in trainer.callbacks if c.weight_set is not None]
        if stage == "fit" and averaging:
            raise ValueError(
                f"ModelPruning and {type(averaging[0]).__name__} exclude each other: a mask renames the parameters "
                "that are averaged; prune in a further fit"
            )
        given = self.sanitize_parameters_to_prune(
            pl_module, self._given, self._parameter_names
        )
        self._parameters_to_prune = self.filter_parameters_to_prune(given)
        prefixes = {id(each): prefix for prefix, each in pl_module.named_modules()}
        by_name = {
            f"{prefixes[id(module)]}.{name}": (module, name)
            for module, name in self._parameters_to_prune
        }
        if by_name != self._by_name:
            # Another model than that of an earlier fit, whose masks it must not get.
            self._by_name = by_name
            self._kept = {}
            self._note_originals()
        for full_name, (module, _) in by_name.items():
            hook = partial(self._take_mask, full_name)
            self._hooks.append(module.register_load_state_dict_pre_hook(hook))

    def _note_originals(self) -> None:
        self._original_layers = {}
        if not self._use_lottery_ticket_hypothesis:
            return
        for number, (module, name) in enumerate(self._parameters_to_prune):
            if id(module) not in self._original_layers:
                layer = {"data": plain_copy(module), "names": []}
                self._original_layers[id(module)] = layer
            self._original_layers[id(module)]["names"].append((number, name))

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        # Only now: with a mask a parameter has another name, and optimizers' states are loaded by the plain ones.
        for full_name, (module, name) in self._by_name.items():
            kept = self._kept.get(full_name)
            if kept is None or hasattr(module, f"{name}_orig"):
                continue
            weight = getattr(module, name)
            mask = kept["mask"].to(weight)
            with torch.no_grad():
                weight[mask == 0] = kept["pruned"].to(weight)
            prune.custom_from_mask(module, name, mask)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._prune_on_train_epoch_end:
            self._prune(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        is_inside_fit = trainer.validating and trainer.state.fn == "fit"
        if is_inside_fit and not self._prune_on_train_epoch_end:
            self._prune(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._make_pruning_permanent:
            # A fit that goes on prunes further.
            self._kept = self._masks()
            self.make_pruning_permanent(pl_module)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "")

    def _prune(self, trainer: Trainer) -> None:
        epoch = trainer.current_epoch
        amount = self.amount(epoch) if callable(self.amount) else self.amount
        if not amount or not _decided(self._apply_pruning, epoch):
            return
        self.apply_pruning(amount)
        if _decided(self._use_lottery_ticket_hypothesis, epoch):
            self.apply_lottery_ticket_hypothesis()
        if trainer.world_size > 1:
            self._agree(trainer)
        for module, name in self._parameters_to_prune:
            # Without the graph that made it, a copy of the module can be made.
            mask = getattr(module, f"{name}_mask")
            setattr(module, name, trained(module, name).detach() * mask)

    def _agree(self, trainer: Trainer) -> None:
        """Give all processes the first one's masks and values, as each draws other random numbers. A collective."""
        tensors = [
            tensor
            for module, name in self._parameters_to_prune
            for tensor in (getattr(module, f"{name}_mask"), trained(module, name))
        ]
        own = [tensor.detach().cpu() for tensor in tensors]
        with torch.no_grad():
            shared = trainer.strategy.broadcast(own)  # collective
            for tensor, value in zip(tensors, shared, strict=True):
                tensor.copy_(value)

    def _tell(self, before: list[tuple[int, int]], amount: float) -> None:
        """Log how much was pruned, in all and by parameter."""
        after = [zeros_and_size(*each) for each in self._parameters_to_prune]
        size = sum(count for _, count in after)
        was = _share(sum(zeros for zeros, _ in before), size, f"/{size}")
        now = _share(sum(zeros for zeros, _ in after), size, f"/{size}")
        log.info("Applied `%s`. Pruned: %s -> %s", self._method_name, was, now)
        if self._verbose < 2:
            return
        rows = zip(self._parameters_to_prune, before, after, strict=True)
        for (module, name), old, new in rows:
            log.info(
                "Applied `%s` to `%r.%s` with amount=%s. Pruned: %s -> %s",
                self._method_name,
                module,
                name,
                amount,
                _share(*old),
                _share(*new),
            )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        originals = {
            f"{number}.{name}": getattr(layer["data"], name).detach()
            for layer in self._original_layers.values()
            for number, name in layer["names"]
        }
        return {"parameters": {**self._kept, **self._masks()}, "originals": originals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = dict(state_dict["parameters"])
        saved = state_dict["originals"]
        for layer in self._original_layers.values():
            for number, name in layer["names"]:
                value = saved.get(f"{number}.{name}")
                if value is not None:
                    getattr(layer["data"], name).detach().copy_(value)

    def _masks(self) -> dict[str, dict[str, Tensor]]:
        """By full name: the mask of each parameter that has one, and the values that it hides."""
        masks = {}
        for full_name, (module, name) in self._by_name.items():
            mask = getattr(module, f"{name}_mask", None)
            if mask is not None:
                hidden = trained(module, name).detach()[mask == 0]
                masks[full_name] = {"mask": mask.bool(), "pruned": hidden}
        return masks

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        if not self._make_pruning_permanent:
            return
        state = dict(checkpoint["state_dict"])
        renamed = {}
        for original in [key for key in state if key.endswith("_orig")]:
            name = original.removesuffix("_orig")
            mask = state.pop(f"{name}_mask", None)
            if mask is not None:
                state[name] = state.pop(original) * mask
                renamed[original] = name
        checkpoint["state_dict"] = state
        _rename_parameters(checkpoint, renamed)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        plain = {f"{full_name}_orig": full_name for full_name in self._by_name}
        _rename_parameters(checkpoint, plain)

    def _take_mask(
        self, full_name: str, module: nn.Module, state: Any, prefix: str, *_: Any
    ) -> None:
        """Before weights are loaded into a module: take the mask out of them, and off the module."""
        name = full_name.rpartition(".")[2]
        key = f"{prefix}{name}"
        mask = state.pop(f"{key}_mask", None)
        if mask is not None:
            original = state.pop(f"{key}_orig")
            state[key] = original * mask
            hidden = original[mask == 0]
            self._kept[full_name] = {"mask": mask.bool(), "pruned": hidden}
        if hasattr(module, f"{name}_orig"):
            prune.remove(module, name)


def _are_pairs(given: Any) -> bool:
    """Whether it is a list of modules with names of their parameters."""
    return isinstance(given, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and [*map(type, pair[1:])] == [str]
        and isinstance(pair[0], nn.Module)
        for pair in given
    )


def _decided(choice: bool | Callable[[int], bool], epoch: int) -> bool:
    return bool(choice(epoch)) if callable(choice) else choice


def _share(zeros: int, size: int, of: str = "") -> str:
    return f"{zeros}{of} ({zeros / max(size, 1):.2%})"


def _rename_parameters(checkpoint: dict[str, Any], names: dict[str, str]) -> None:
    """Give parameters other names in the optimizers' states."""
    if "optimizer_parameters" in checkpoint:
        checkpoint["optimizer_parameters"] = [
            [[names.get(name, name) for name in group] for group in groups]
            for groups in checkpoint["optimizer_parameters"]
        ]
