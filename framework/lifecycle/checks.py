"""What a run needs of its module and data, checked before anything is set up."""

from __future__ import annotations

import reprlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ...strategies.optimizer_state import parameters_of
from ..datamodule import DataModule
from ..loop.closure import check_closure, takes_closure
from ..loop.loaders import LOADER_METHODS
from ..loop.step import step_arguments
from ..messages import log
from ..module import Module
from ..subclasses import (
    HOOKS_ELSEWHERE,
    check_arguments,
    check_hook_arguments,
    check_names,
    overrides,
)

if TYPE_CHECKING:
    from ..loop.optimizers import LRSchedulerConfig
    from ..trainer import Trainer

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def check_run(
    trainer: Trainer, fn: str, module: Any, datamodule: Any, given: dict[str, Any]
) -> None:
    """Raise unless ``module`` and the data have what ``fn`` needs.

    Args:
        trainer: whose arguments say how much is run.
        fn: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        module: what is to run.
        datamodule: its data, or None.
        given: the loaders that were passed, by stage.

    Raises:
        TypeError: if one of them is no Module or DataModule.
        ValueError: if a step, a loader or ``configure_optimizers`` is missing, or a method has nearly the name of one
            that is called.
    """
    _check_kinds(fn, module, datamodule)
    if fn == "fit":
        _check_training(trainer, module)
        if trainer.limit_train_batches:
            _require_loader(
                module,
                datamodule,
                given,
                "train",
                "train_dataloader",
                "train_dataloaders",
            )
        if given.get("validate") is not None:
            _require_step(module, "validation_step")
        elif trainer.limit_val_batches:
            _note_missing_validation(trainer, module, datamodule)
    elif fn == "predict":
        if module.predict_step is None:
            raise ValueError(
                f"{type(module).__name__} sets predict_step to None: define it, or leave it as it is"
            )
        _require_loader(
            module, datamodule, given, "predict", "predict_dataloader", "dataloaders"
        )
    else:
        _require_step(module, "validation_step" if fn == "validate" else "test_step")
        name = "val_dataloader" if fn == "validate" else "test_dataloader"
        _require_loader(module, datamodule, given, fn, name, "dataloaders")
    _check_methods(module, datamodule)


def _check_kinds(fn: str, module: Any, datamodule: Any) -> None:
    """Raise unless these are a Module, and a DataModule or None."""
    if not isinstance(module, Module):
        raise TypeError(
            f"{fn} takes a loopwright.framework.Module; got {type(module).__name__}"
            " (subclass Module, and give it a training_step and configure_optimizers)"
        )
    if type(module).__hash__ is None:
        raise TypeError(
            f"{type(module).__name__} cannot be hashed, as it compares by value, and torch keeps modules in sets: "
            "make it by @dataclass(eq=False)"
        )
    if datamodule is not None and not isinstance(datamodule, DataModule):
        raise TypeError(
            f"datamodule must be a loopwright.framework.DataModule; got {datamodule!r}"
        )


def _check_training(trainer: Trainer, module: Module) -> None:
    """Raise unless the module can be trained, in the way that it asks for."""
    name = type(module).__name__
    automatic = module.automatic_optimization
    _require_step(module, "training_step")
    if any(
        not is_lazy(parameter) and parameter.is_inference()
        for parameter in module.parameters()
    ):
        raise ValueError(
            f"{name} was made under torch.inference_mode(), as in a hook of an evaluation, and "
            "cannot be trained: make it before, or pass inference_mode=False to the Trainer that evaluates"
        )
    if automatic and not overrides(module, "configure_optimizers", Module):
        raise ValueError(
            f"{name} has no configure_optimizers: return an optimizer from it, such as "
            "torch.optim.Adam(self.parameters()), or set self.automatic_optimization = False in __init__"
        )
    if not automatic and not trainer.strategy.capabilities.manual_optimization:
        raise ValueError(
            f"{name} sets automatic_optimization = False, and strategy={trainer.strategy.name!r} "
            'computes gradients only after a whole step; use "ddp", or automatic optimization'
        )
    if not automatic and trainer.micro_batch is not None:
        raise ValueError(
            f"micro_batch={trainer.micro_batch!r} is for automatic optimization, and {name} sets "
            "automatic_optimization = False: divide the batch in its training_step"
        )


def _check_methods(module: Module, datamodule: DataModule | None) -> None:
    """Raise if a method is misspelt, so that nobody calls it, or does not take the arguments that it will get."""
    for owner, base in ((module, Module), (datamodule, DataModule)):
        known = [name for name in dir(base) if _is_hook(name)]
        check_names(owner, base, known, HOOKS_ELSEWHERE)
        for name in LOADER_METHODS.values():
            loader = getattr(owner, name, None)
            if loader is not None and not callable(loader):
                raise TypeError(
                    f"{type(owner).__name__}.{name} must be a method that returns the loader; got "
                    f"{reprlib.repr(loader)}"
                )
        for name in (*known, "optimizer_zero_grad"):
            if name in (*_STEPS, "optimizer_step") or not hasattr(base, name):
                continue
            if owner is not None and overrides(owner, name, base):
                check_hook_arguments(owner, name, base)
    if overrides(module, "backward", Module):
        check_arguments(module, "backward", ("loss",))
    if overrides(module, "optimizer_step", Module):
        arguments = ("epoch", "batch_idx", "optimizer", "optimizer_closure")
        check_arguments(module, "optimizer_step", arguments, arguments[:3])
    for name in _STEPS:
        arguments = ("batch", "batch_idx", "dataloader_idx")[
            : 2 if name == "training_step" else 3
        ]
        if overrides(module, name, Module):
            step = getattr(module, name)
            check_arguments(module, name, arguments[: step_arguments(step)])


def _is_hook(name: str) -> bool:
    """Whether a method of a base class is one that the loop calls, and that a misspelt name may have meant."""
    others = ("setup", "teardown", "transfer_batch_to_device")
    return (
        name.startswith(("on_", "configure_"))
        or name.endswith("_step")
        or name in others
    )


def _require_step(module: Module, name: str) -> None:
    if overrides(module, name, Module):
        return
    names = [
        n for n in dir(type(module)) if not hasattr(Module, n) and not n.startswith("_")
    ]
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean its {near[0]!r}?" if near else ""
    raise ValueError(
        f"{type(module).__name__} has no {name}(batch, batch_idx): define it{hint}"
    )


def _note_missing_validation(
    trainer: Trainer, module: Module, datamodule: DataModule | None
) -> None:
    """Warn if a module can validate and there is no loader, or the reverse."""
    has_loader = _has_loader_method(module, datamodule, "val_dataloader")
    has_step = overrides(module, "validation_step", Module)
    if has_step and not has_loader:
        _warn(
            trainer,
            f"{type(module).__name__} has a validation_step, and there is no validation loader: nothing is validated. "
            f"Pass val_dataloaders, or define val_dataloader(){_misnamed(module, datamodule, 'val_dataloader')}",
        )
    elif has_loader and not has_step:
        _warn(
            trainer,
            f"There is a val_dataloader, and {type(module).__name__} has no validation_step: nothing is validated",
        )


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        log.warning("%s", message)


def _has_loader_method(
    module: Module, datamodule: DataModule | None, name: str
) -> bool:
    """Whether the module or its data defines the method ``name``, which makes a loader."""
    return overrides(module, name, Module) or (
        datamodule is not None and overrides(datamodule, name, DataModule)
    )


def _misnamed(module: Module, datamodule: DataModule | None, name: str) -> str:
    """A hint at a method whose name is nearly ``name``, or an empty string."""
    for owner in (datamodule, module):
        names = [
            n
            for n in dir(type(owner))
            if not hasattr(Module, n) and not n.startswith("_")
        ]
        if near := get_close_matches(name, names, n=1, cutoff=0.75):
            return f"; did you mean {type(owner).__name__}.{near[0]}, which is never called?"
    return ""


def _require_loader(
    module: Module,
    datamodule: Any,
    given: dict[str, Any],
    stage: str,
    name: str,
    argument: str,
) -> None:
    if given.get(stage) is None and not _has_loader_method(module, datamodule, name):
        raise ValueError(
            f"there is no {stage} loader: pass {argument}=…, or define {name}() on the module or its data"
            f"{_misnamed(module, datamodule, name)}"
        )


def check_optimizers(
    trainer: Trainer,
    module: Module,
    optimizers: list[Any],
    schedulers: list[LRSchedulerConfig],
) -> None:
    """Raise unless automatic optimization can step what ``configure_optimizers`` returned.

    Args:
        trainer: who trains with them.
        module: the module.
        optimizers: its optimizers.
        schedulers: its schedulers.

    Raises:
        ValueError: if a scheduler has no value to monitor, if two optimizers train the same parameter, or if a step
            needs what the Trainer cannot give.
    """
    # In manual optimization the module steps them itself, as it likes.
    if not module.automatic_optimization:
        return
    for config in schedulers:
        config.require_monitor()
    if not optimizers:
        _warn(
            trainer,
            "configure_optimizers returned no optimizer, so this fit will run with no optimizer: losses and gradients "
            "are computed, and nothing is trained",
        )
    if len(optimizers) > 1:
        _check_several(module, optimizers)
    for optimizer in optimizers:
        check_closure(trainer, module, optimizer)
        if set(module.parameters()).isdisjoint(parameters_of(optimizer)):
            _warn(
                trainer,
                f"configure_optimizers returned an optimizer of none of {type(module).__name__}'s parameters "
                f"({type(optimizer).__name__}): nothing of it is trained",
            )


def _check_several(module: Module, optimizers: list[Optimizer]) -> None:
    """Raise unless these can step on the gradients of one loss, one after the other.

    Raises:
        ValueError: if two of them train the same parameter, or one of them needs a closure.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    owners: dict[Tensor, Optimizer] = {}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if takes_closure(module, optimizer):
            raise ValueError(
                f"configure_optimizers returned {len(optimizers)} optimizers, and {kind}'s step, or "
                f"{type(module).__name__}.optimizer_step, takes a closure, which would run the batch once for each: "
                "return one optimizer, let optimizer_step take (epoch, batch_idx, optimizer), or set "
                "self.automatic_optimization = False"
            )
        for parameter in parameters_of(optimizer):
            if parameter in owners:
                owner = type(owners[parameter]).__name__
                raise ValueError(
                    f"configure_optimizers: {names.get(parameter, 'a parameter')} is in {owner} and in "
                    f"{kind}; in automatic optimization each parameter is trained by one optimizer. For several "
                    "losses, set self.automatic_optimization = False in __init__ and call opt.update(loss) for each"
                )
            owners[parameter] = optimizer


def check_new_optimizers(trainer: Trainer, optimizers: Any) -> None:
    """Raise unless these can take the place of the optimizers of a fit.

    Args:
        trainer: whose fit it is.
        optimizers: what is set as ``trainer.optimizers``.

    Raises:
        TypeError: if they are no list of optimizers.
        ValueError: as :func:`check_optimizers`; also if they cannot step as the fit does, with a closure or without.
    """
    is_list = isinstance(optimizers, (list, tuple))
    if not is_list or not all(isinstance(each, Optimizer) for each in optimizers):
        raise TypeError(
            f"trainer.optimizers must be a list of optimizers; got {optimizers!r}"
        )
    module = trainer.module
    before = trainer.optimizers
    if module.automatic_optimization and len(before) != len(optimizers):
        raise ValueError(
            f"trainer.optimizers: this fit began with {len(before)} and cannot go on with {len(optimizers)}: return "
            "them from configure_optimizers"
        )
    check_optimizers(trainer, module, list(optimizers), [])
    if not module.automatic_optimization:
        return
    for old, new in zip(before, optimizers, strict=True):
        if takes_closure(module, new) is not takes_closure(module, old):
            raise ValueError(
                f"trainer.optimizers: a {type(new).__name__} cannot take the place of a {type(old).__name__} "
                "during a fit, as only one of them steps by a closure: return it from configure_optimizers"
            )
