"""Lightning's functions about the methods and modes of modules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ...subclasses import overrides

__all__ = ["_ModuleMode", "_restricted_classmethod", "is_overridden", "of_class"]

log = logging.getLogger("loopwright")

if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class:  # noqa: N801 # a decorator
        """A classmethod that is not called by an object, which would stay as it is.

        Args:
            function: the method.
        """

        def __init__(self, function: Callable[..., Any]) -> None:
            self.__func__ = function
            self.__doc__ = function.__doc__

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                return MethodType(self.__func__, owner)
            return self._refuse

        def _refuse(self, *_: Any, **__: Any) -> None:
            name = self.__func__.__qualname__
            raise TypeError(
                f"{name} cannot be called on an instance: call it on the class, and use what it returns"
            )


_restricted_classmethod = of_class


def is_overridden(method_name: str, instance: Any = None, parent: Any = None) -> bool:
    """Whether an object has a method of its own.

    Args:
        method_name: of the method.
        instance: the object; nothing is overridden in None.
        parent: the class whose method does not count. Default: that of Loopwright which it derives from.

    Raises:
        ValueError: if it derives from none.
    """
    if instance is None:
        return False
    if parent is None:
        parent = _contract_of(instance)
    return hasattr(parent, method_name) and overrides(instance, method_name, parent)


def _contract_of(instance: Any) -> type:
    """The class of Loopwright that is the nearest to an object's."""
    for kind in type(instance).__mro__:
        if kind.__module__.startswith("loopwright."):
            return _without_demos(kind)
    raise ValueError(
        f"Expected a parent, as {type(instance).__name__} derives from no class of the trainer"
    )


def _without_demos(kind: type) -> type:
    """A class, or the one that it derives from if it is one of the models for trying things out."""
    while kind.__module__.endswith(".demos"):
        kind = kind.__mro__[1]
    return kind


class _ModuleMode:
    """Remembers which parts of a module are in training mode.

    Attributes:
        mode: whether each part is, by name.
    """

    def __init__(self) -> None:
        self.mode: dict[str, bool] = {}

    def capture(self, module: nn.Module) -> None:
        """Remember the modes of a module's parts."""
        self.mode = {name: part.training for name, part in module.named_modules()}

    def restore(self, module: nn.Module) -> None:
        """Put them back; parts that were not there stay as they are."""
        for name, part in module.named_modules():
            if name in self.mode:
                part.training = self.mode[name]
            else:
                log.debug(
                    "Restoring training mode on module '%s' not possible, it was never captured",
                    name,
                )
