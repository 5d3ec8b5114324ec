"""Optimizers and schedulers that a command line names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .parser import AUTOMATIC, LoopwrightArgumentParser


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's scheduler, with the name of the value that it watches.

    Args:
        optimizer: whose learning rates it lowers.
        monitor: the name of a logged value.
        *args: of torch's ``ReduceLROnPlateau``.
        **kwargs: of torch's ``ReduceLROnPlateau``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        monitor: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


SCHEDULERS = (LRScheduler, ReduceLROnPlateau)


def instantiate_class(args: Any, init: Mapping[str, Any]) -> Any:
    """Make an object of ``{"class_path": …, "init_args": {…}}``.

    Args:
        args: positional arguments before those; one value or a tuple.
        init: the class's path and arguments.
    """
    module, _, name = init["class_path"].rpartition(".")
    positional = args if isinstance(args, tuple) else (args,)
    kind = getattr(import_module(module), name)
    return kind(*positional, **init.get("init_args", {}))


def with_class_path(kind: type, arguments: Any) -> dict[str, Any]:
    """A class and its arguments, as :func:`instantiate_class` takes them."""
    if hasattr(arguments, "as_dict"):
        arguments = arguments.as_dict()
    path = f"{kind.__module__}.{kind.__name__}"
    return {"class_path": path, "init_args": dict(arguments or {})}


def link_classes(parser: LoopwrightArgumentParser) -> None:
    """Give those optimizers and schedulers that are linked to an argument to it."""
    for key, (kind, link_to) in {**parser.optimizers, **parser.lr_schedulers}.items():
        if link_to == AUTOMATIC:
            continue
        if isinstance(kind, tuple):
            parser.link_arguments(key, link_to)
        else:
            parser.link_arguments(
                key, link_to, compute_fn=_ClassPath(kind), apply_on="parse"
            )


class _ClassPath:
    """Adds the class's path to arguments; the function of a link."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __call__(self, arguments: Any) -> dict[str, Any]:
        return with_class_path(self.kind, arguments)


def automatic(kinds: Mapping[str, tuple[Any, str]]) -> list[str]:
    """The keys of those that are linked to no argument: they make a ``configure_optimizers``."""
    return [key for key, (_, link_to) in kinds.items() if link_to == AUTOMATIC]


def chosen_class(kinds: Mapping[str, tuple[Any, str]], key: str, value: Any) -> Any:
    """What was chosen for a key, as :func:`instantiate_class` takes it; None if nothing was."""
    kind, _ = kinds[key]
    return value if isinstance(kind, tuple) else with_class_path(kind, value)
