"""Lightning's functions about constructors' arguments, and about attributes that may be kept in several places."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, MutableMapping
from typing import Any

from ...checkpoint.configs import AttributeDict as NativeAttributeDict

__all__ = [
    "AttributeDict",
    "_get_init_args",
    "clean_namespace",
    "collect_init_args",
    "get_init_args",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "parse_class_init_keys",
    "save_hyperparameters",
]

AttributeDict = NativeAttributeDict


def is_picklable(obj: object) -> bool:
    """Whether an object can be pickled."""
    try:
        pickle.dumps(obj)
    except Exception:
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Take out of a dict what cannot be pickled."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        del hparams[name]


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """The names of a constructor's first argument, of its ``*args`` and of its ``**kwargs``."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    names = {parameter.kind: parameter.name for parameter in parameters}
    return (
        parameters[0].name,
        names.get(inspect.Parameter.VAR_POSITIONAL),
        names.get(inspect.Parameter.VAR_KEYWORD),
    )


def get_init_args(frame: Any) -> dict[str, Any]:
    """The arguments of a constructor, from its frame; empty for the frame of something else."""
    return _get_init_args(frame)[1]


def _get_init_args(frame: Any) -> tuple[Any, dict[str, Any]]:
    """The object that a constructor makes and its arguments, from its frame."""
    values = frame.f_locals
    if "__class__" not in values:
        return None, {}
    information = inspect.getargvalues(frame)
    names = [*information.args[1:]]
    arguments = {name: values[name] for name in names if name != "self"}
    if information.keywords:
        arguments.update(values[information.keywords])
    return values[information.args[0]], arguments


def collect_init_args(
    frame: Any,
    path_args: list[dict[str, Any]],
    inside: bool = False,
    classes: tuple[type, ...] = (),
) -> list[dict[str, Any]]:
    """The arguments of the constructors that are running for one object, the innermost first.

    Args:
        frame: a frame inside them.
        path_args: what to begin with.
        inside: whether ``frame`` is one of a constructor.
        classes: leave out objects of other classes; by default none are.
    """
    found = list(path_args)
    while frame is not None:
        is_init = "__class__" in frame.f_locals
        if is_init:
            made, arguments = _get_init_args(frame)
            is_init = not classes or isinstance(made, classes)
            if is_init and arguments:
                found.append(arguments)
        if inside and not is_init:
            break
        inside = is_init
        frame = frame.f_back
    return found


def save_hyperparameters(
    obj: Any, *args: Any, ignore: Any = None, frame: Any = None
) -> None:
    """Keep arguments of an object's constructor, as its method of this name does."""
    obj.save_hyperparameters(*args, ignore=ignore, frame=frame)


# Attributes of a module, which may be kept in it, its hyperparameters, or its DataModule.


def _holders(model: Any, attribute: str) -> Iterator[Any]:
    """What keeps an attribute: the module, its hyperparameters, its data module, and that one's hyperparameters."""
    trainer = model.__dict__.get("_trainer")
    datamodule = None if trainer is None else trainer.datamodule
    for owner in (model, datamodule):
        if owner is None:
            continue
        if hasattr(owner, attribute):
            yield owner
        hparams = getattr(owner, "hparams", None)
        if hparams is not None and attribute in hparams:
            yield hparams


def _require_holders(model: Any, attribute: str) -> list[Any]:
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(
            f"{attribute} is neither stored in the model namespace nor the `hparams` namespace/dict, nor the "
            "datamodule."
        )
    return holders


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Whether a module, its hyperparameters or its data module have an attribute."""
    return any(True for _ in _holders(model, attribute))


def lightning_getattr(model: Any, attribute: str) -> Any:
    """The value of an attribute, of the data module if that has it, or else of the module or its hyperparameters.

    Raises:
        AttributeError: if nothing has it.
    """
    holder = _require_holders(model, attribute)[-1]
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set an attribute wherever it is kept.

    Raises:
        AttributeError: if nothing has it.
    """
    for holder in _require_holders(model, attribute):
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)
