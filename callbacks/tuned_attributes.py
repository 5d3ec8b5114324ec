"""Where a module or its data keeps a number that is tuned, such as the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..framework import Module, Trainer


def _holders(trainer: Trainer, module: Module, name: str) -> list[Any]:
    """The module and its data module, and their hyperparameters, as far as they have an attribute of that name."""
    owners = [owner for owner in (module, trainer.datamodule) if owner is not None]
    found: list[Any] = [owner for owner in owners if hasattr(owner, name)]
    for owner in owners:
        found += [
            held for held in (owner.hparams, owner.hparams_initial) if name in held
        ]
    return found


def find_attribute(
    trainer: Trainer, module: Module, names: tuple[str, ...]
) -> str | None:
    """The first of these names that the module, its data module, or the hyperparameters of one of them have."""
    return next((name for name in names if _holders(trainer, module, name)), None)


def get_attribute(trainer: Trainer, module: Module, name: str) -> Any:
    """Its value, that of the module first."""
    holder = _holders(trainer, module, name)[0]
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def set_attribute(trainer: Trainer, module: Module, name: str, value: Any) -> None:
    """Set it wherever it is."""
    for holder in _holders(trainer, module, name):
        if isinstance(holder, dict):
            holder[name] = value
        else:
            setattr(holder, name, value)
