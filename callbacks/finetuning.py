"""Train a part of a model first, and the rest later."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from logging import getLogger
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .arguments import require_int
from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

# A module, or modules in any nesting.
Modules = nn.Module | Iterable[Any]


class BaseFinetuning(Callback):
    """Freezes parts of a model before the training, and unfreezes them while it goes on. Override two methods.

    ``configure_optimizers`` must leave frozen parameters out, by ``filter(lambda p: p.requires_grad,
    self.parameters())``. Each time something is unfrozen, its parameters become a new group of the optimizer. The
    optimizer's schedulers are told of it: a group follows them in proportion to its own rate.

    A run that resumes has the groups again before the optimizer's state is loaded, and what was frozen is frozen.

    Attributes:
        param_groups: by the optimizer's index, its parameter groups with the names of their parameters.

    Raises:
        NotImplementedError: under DeepSpeed, whose optimizers take no further groups.
    """

    def __init__(self) -> None:
        self.param_groups: dict[int, list[dict[str, Any]]] = {}
        # Names of frozen parameters, and of batch norms that keep no statistics.
        self._frozen: list[str] | None = []

    def freeze_before_training(self, pl_module: Module) -> None:
        """Freeze what is not trained at first. It is called before ``configure_optimizers``; to be overridden.

        Args:
            pl_module: the module.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override freeze_before_training"
        )

    def finetune_function(
        self, pl_module: Module, epoch: int, optimizer: Optimizer
    ) -> None:
        """Unfreeze what is trained from this epoch on; to be overridden. It is called for each optimizer.

        Args:
            pl_module: the module.
            epoch: the epoch that begins.
            optimizer: gets the parameters, by :meth:`unfreeze_and_add_param_group`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override finetune_function"
        )

    # What the Trainer calls.

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        name = trainer.strategy.name
        if name.startswith("deepspeed"):
            raise NotImplementedError(
                f"{type(self).__name__} adds parameter groups while the training goes on, which strategy={name!r} "
                'does not take: use "ddp" or "fsdp"'
            )
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            self.param_groups = {}
            return
        if not self.param_groups:
            return
        for name, owner, switch in _switches(pl_module):
            if self._frozen is not None:
                setattr(owner, switch, name not in self._frozen)
        parameters = dict(_named_parameters(pl_module))
        for index, optimizer in enumerate(trainer.optimizers):
            present = len(optimizer.param_groups)
            for saved in self.param_groups.get(index, [])[present:]:
                own = [parameters[name].requires_grad_() for name in saved["params"]]
                optimizer.add_param_group({**saved, "params": own})
            _tell_schedulers(trainer, optimizer, present)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        names = {parameter: name for name, parameter in _named_parameters(pl_module)}
        for index, optimizer in enumerate(trainer.optimizers):
            present = len(optimizer.param_groups)
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            _tell_schedulers(trainer, optimizer, present)
            self.param_groups[index] = [
                {**group, "params": [names[p] for p in group["params"] if p in names]}
                for group in optimizer.param_groups
            ]
        self._frozen = [
            name
            for name, owner, switch in _switches(pl_module)
            if not getattr(owner, switch)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "internal_optimizer_metadata": self.param_groups,
            "frozen": self._frozen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups = state_dict["internal_optimizer_metadata"]
        # Another trainer's state has no names of what is frozen.
        self._frozen = state_dict.get("frozen")

    # What an override uses.

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """The modules inside of a module or several that have no further modules in them, or parameters of their own.

        Args:
            modules: a module, or modules in any nesting.
        """
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, Iterable):
            found = [
                part
                for each in modules
                for part in BaseFinetuning.flatten_modules(each)
            ]
        else:
            found = list(modules.modules())
        return [
            part
            for part in dict.fromkeys(found)
            if not any(part.children()) or any(part.parameters(recurse=False))
        ]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Iterator[nn.Parameter]:
        """The parameters that are trained, or those that are not.

        Args:
            modules: a module, or modules in any nesting.
            train_bn: False leaves those of batch norms out.
            requires_grad: which of the two.
        """
        for part in BaseFinetuning.flatten_modules(modules):
            if isinstance(part, _BatchNorm) and not train_bn:
                continue
            for parameter in part.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Unfreeze all parameters; batch norms gather statistics again.

        Args:
            modules: a module, or modules in any nesting.
        """
        for part in BaseFinetuning.flatten_modules(modules):
            _set_trainable(part, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze a module's own parameters, but not those of modules inside it.

        Args:
            module: the module; a batch norm gathers no statistics any more.
        """
        _set_trainable(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters.

        Args:
            modules: a module, or modules in any nesting.
            train_bn: leave batch norms to be trained.
        """
        for part in BaseFinetuning.flatten_modules(modules):
            _set_trainable(part, train_bn and isinstance(part, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(
        optimizer: Optimizer, params: Iterable[Tensor]
    ) -> list[Tensor]:
        """The parameters that an optimizer does not have yet; a warning says if it has some.

        Args:
            optimizer: the optimizer.
            params: the parameters.
        """
        present = _parameter_ids(optimizer)
        params = list(params)
        added = [parameter for parameter in params if id(parameter) not in present]
        if len(added) < len(params):
            warnings.warn(
                "The provided params to be frozen already exist within another group of this optimizer. "
                f"{len(params) - len(added)} of {len(params)} are left there, with its learning rate. Did you init "
                f"your optimizer in configure_optimizers as {type(optimizer).__name__}("
                "filter(lambda p: p.requires_grad, self.parameters()), ...)?",
                stacklevel=2,
            )
        return added

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules, and add their parameters to an optimizer as a new group.

        Args:
            modules: a module, or modules in any nesting. Batch norms in it that were trained all along, as
                :meth:`freeze` leaves them by default, stay in their group.
            optimizer: gets the group.
            lr: its learning rate (default: that of the first group, divided by ``initial_denom_lr``).
            initial_denom_lr: see ``lr``.
            train_bn: False leaves batch norms out.
        """
        norms = _trained_batch_norms(modules) & _parameter_ids(optimizer)
        BaseFinetuning.make_trainable(modules)
        if lr is None:
            lr = float(optimizer.param_groups[0]["lr"]) / initial_denom_lr
        found = BaseFinetuning.filter_params(modules, train_bn=train_bn)
        trained = [parameter for parameter in found if id(parameter) not in norms]
        added = BaseFinetuning.filter_on_optimizer(optimizer, trained)
        if added:
            optimizer.add_param_group({"params": added, "lr": lr})


def multiplicative(epoch: int) -> float:
    """The factor by which :class:`BackboneFinetuning` raises the backbone's rate each epoch, by default."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Trains all of a model but its ``backbone`` first, and then the backbone with a rate that rises to the others'.

    Args:
        unfreeze_backbone_at_epoch: the epoch with which the backbone's training begins.
        lambda_func: given the epoch after, by which factor the backbone's rate rises each epoch.
        backbone_initial_ratio_lr: its first rate, as a fraction of the first group's.
        backbone_initial_lr: the same as a number.
        should_align: keep the rate at that of the first group once it has come there.
        initial_denom_lr: has no effect, as the first rate is always given; taken for familiarity.
        train_bn: whether batch norms of the backbone are trained.
        verbose: say both rates each epoch.
        rounding: to how many digits.

    Attributes:
        previous_backbone_lr: the backbone's rate in this epoch; None before it is trained.

    Raises:
        ValueError: if ``unfreeze_backbone_at_epoch`` is no epoch; in a fit, if the module has no submodule
            ``backbone``, or the run goes on after that epoch from a checkpoint without this callback's state.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        require_int("unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, 0)
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "previous_backbone_lr": self.previous_backbone_lr,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)

    def freeze_before_training(self, pl_module: Module) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise ValueError(
                f"BackboneFinetuning: {type(pl_module).__name__} should have an nn.Module as its attribute `backbone`"
            )
        self.freeze(pl_module.backbone)

    def finetune_function(
        self, pl_module: Module, epoch: int, optimizer: Optimizer
    ) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        current = float(optimizer.param_groups[0]["lr"])
        if epoch == self.unfreeze_backbone_at_epoch:
            rate = self.backbone_initial_lr
            if rate is None:
                rate = current * self.backbone_initial_ratio_lr
            self.unfreeze_and_add_param_group(
                pl_module.backbone,
                optimizer,
                rate,
                initial_denom_lr=self.initial_denom_lr,
                train_bn=self.train_bn,
            )
        else:
            if self.previous_backbone_lr is None:
                raise ValueError(
                    f"BackboneFinetuning was to train the backbone from epoch {self.unfreeze_backbone_at_epoch} on, "
                    f"and the run goes on in epoch {epoch} from a checkpoint that has no state of it: set "
                    f"unfreeze_backbone_at_epoch to {epoch} or more"
                )
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align:
                rate = min(rate, current)
            group = optimizer.param_groups[-1]
            if _is_of_part(group, pl_module.backbone, optimizer):
                group["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            digits = self.rounding
            log.info(
                "Current lr: %s, Backbone lr: %s",
                round(current, digits),
                round(rate, digits),
            )


def _is_of_part(group: dict[str, Any], part: Any, optimizer: Optimizer) -> bool:
    """Whether a parameter group is not the optimizer's first, and has parameters of this part of the module alone."""
    own = {id(parameter) for parameter in part.parameters()}
    is_first = group is optimizer.param_groups[0]
    return not is_first and all(id(each) in own for each in group["params"])


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _trained_batch_norms(modules: Modules) -> set[int]:
    """The ids of parameters that are trained, and belong to batch norms."""
    return {
        id(parameter)
        for part in BaseFinetuning.flatten_modules(modules)
        for parameter in part.parameters(recurse=False)
        if isinstance(part, _BatchNorm) and parameter.requires_grad
    }


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, by the names that they have without a mask of ``torch.nn.utils.prune``."""
    for name, parameter in module.named_parameters():
        yield name.removesuffix("_orig"), parameter


def _switches(module: nn.Module) -> list[tuple[str, Any, str]]:
    """What freezing sets: the names of parameters and batch norms, these themselves, and the attribute."""
    return [
        *((name, p, "requires_grad") for name, p in _named_parameters(module)),
        *(
            (name, part, "track_running_stats")
            for name, part in module.named_modules()
            if isinstance(part, _BatchNorm)
        ),
    ]


def _set_trainable(part: nn.Module, is_trained: bool) -> None:
    """Freeze or unfreeze a module's own parameters."""
    if isinstance(part, _BatchNorm):
        part.track_running_stats = is_trained
    for parameter in part.parameters(recurse=False):
        parameter.requires_grad = is_trained


def _tell_schedulers(trainer: Trainer, optimizer: Optimizer, present: int) -> None:
    """Let an optimizer's schedulers know of the groups that were added after the first ``present``."""
    first, *_ = optimizer.param_groups
    for group in optimizer.param_groups[present:]:
        ratio = float(group["lr"]) / (float(first["lr"]) or 1.0)
        # Keys of schedulers, such as the rates that OneCycleLR begins and ends with.
        for key in first.keys() - group.keys():
            group[key] = first[key] * ratio if key.endswith("_lr") else first[key]
        for config in trainer.lr_scheduler_configs:
            for scheduler in (config.scheduler, *_inside(config.scheduler)):
                if getattr(scheduler, "optimizer", None) is optimizer:
                    _extend(scheduler, ratio)


def _inside(scheduler: Any) -> list[Any]:
    """The schedulers that one calls in turn or together."""
    inner = getattr(scheduler, "_schedulers", [])
    return [found for each in inner for found in (each, *_inside(each))]


def _extend(scheduler: Any, ratio: float) -> None:
    """Add an entry for a new group, whose rate is the first group's times ``ratio``, to a scheduler's lists."""
    rates = ("base_lrs", "max_lrs", "_last_lr")
    for name in (*rates, "lr_lambdas", "min_lrs", "base_momentums", "max_momentums"):
        if values := getattr(scheduler, name, None):
            values.append(values[0] * ratio if name in rates else values[0])
