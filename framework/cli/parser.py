"""The parser of a command line: jsonargparse's, with the classes of a training, and an advice for a misspelt option."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any, ClassVar, NoReturn

import torch
from jsonargparse import (
    ArgumentParser,
    register_unresolvable_import_paths,
    set_parsing_settings,
)
from jsonargparse.typing import class_from_function
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ... import callbacks, loggers
from ...callbacks.base import Callback
from ...strategies import DDPStrategy, Precision
from ..arguments import advice_on
from ..datamodule import DataModule
from ..module import Module
from ..trainer import Trainer

# Classes of torch whose `__module__` is not where they can be imported from.
register_unresolvable_import_paths(torch)
# A user may subclass it, though it is a dataclass.
set_parsing_settings(
    config_read_mode_fsspec_enabled=True, subclasses_enabled=[Precision]
)

# A class is found by its name alone once it has been imported, which costs time for the other strategies.
NAMED = [
    DDPStrategy,
    *(getattr(callbacks, name) for name in callbacks.__all__),
    *(getattr(loggers, name) for name in loggers.__all__),
]

# An optimizer or scheduler that is linked to no argument, and makes a `configure_optimizers`.
AUTOMATIC = "AUTOMATIC"
_PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau

# What jsonargparse says of an option that there is not.
_UNKNOWN = re.compile(
    r"unrecognized arguments: (--)?(?P<first>[^\s=]+)"
    r"|(Group '(?P<group>[^']+)'|Subcommand '[^']+') does not accept option '(?P<name>[^']+)'"
    r"|^Option '(?P<only>[^']+)' is not accepted"
)
_UNKNOWN_IN_CLASS = re.compile(
    r"class_path '(?P<path>[^']+)':\s+Option '(?P<name>[^']+)' is not accepted"
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)\s")


class LoopwrightArgumentParser(ArgumentParser):
    """Reads options, environment variables and configuration files.

    Args:
        *args: of jsonargparse's ``ArgumentParser``.
        description: what ``--help`` says of the program.
        env_prefix: how the names of environment variables begin.
        default_env: whether such variables are read.
        **kwargs: of jsonargparse's ``ArgumentParser``.

    Attributes:
        callback_keys: the keys of callbacks that were added.
        optimizers, lr_schedulers: by key, the class or classes that were added, and what they are linked to.
        method_arguments: the arguments of the Trainer's method that this parser is for.
    """

    # What is raised where a program adds what has no arguments here.
    misconfigured: ClassVar[type[Exception]] = TypeError

    def __init__(
        self,
        *args: Any,
        description: str = "Train, validate, test or predict",
        env_prefix: str = "LOOPWRIGHT",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        # A beginning of an option is a misspelt one.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(
            *args,
            description=description,
            env_prefix=env_prefix,
            default_env=default_env,
            **kwargs,
        )
        self.callback_keys: list[str] = []
        self.optimizers: dict[str, tuple[Any, str]] = {}
        self.lr_schedulers: dict[str, tuple[Any, str]] = {}
        self.method_arguments: list[str] = []

    def add_loopwright_class_args(
        self,
        loopwright_class: type[Any] | Callable[..., Any],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a Trainer, Module, DataModule or Callback.

        Args:
            loopwright_class: the class, or a function that returns an object of one and says so.
            nested_key: the options' prefix.
            subclass_mode: whether the user may choose a subclass, by its path.
            required: whether the user has to, then.

        Returns:
            The keys of the arguments.

        Raises:
            TypeError: for another class.
        """
        kind: Any = loopwright_class
        if callable(kind) and not isinstance(kind, type):
            kind = class_from_function(kind)
        known = (Trainer, Module, DataModule, Callback)
        if not isinstance(kind, type) or not issubclass(kind, known):
            raise self.misconfigured(
                f"Cannot add arguments from: {loopwright_class!r} is no Trainer, Module, DataModule or Callback, and "
                "no function whose annotation says that it returns one"
            )
        if issubclass(kind, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            self.add_subclass_arguments(
                kind, nested_key, fail_untyped=False, required=required
            )
            return [nested_key]
        return self.add_class_arguments(
            kind,
            nested_key,
            fail_untyped=False,
            # The CLI makes it itself, with further callbacks.
            instantiate=not issubclass(kind, Trainer),
            sub_configs=True,
        )

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add the arguments of an optimizer.

        Args:
            optimizer_class: its class; or a tuple of classes, of which the user may choose a subclass by its path.
            nested_key: the options' prefix.
            link_to: the argument that gets it as ``{"class_path": …, "init_args": …}``. By default, it makes the
                module's ``configure_optimizers``.
        """
        self._add_classes(optimizer_class, nested_key, Optimizer, "params")
        self.optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: type[Any] | tuple[type[Any], ...] = (LRScheduler, _PLATEAU),
        nested_key: str = "lr_scheduler",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add the arguments of a scheduler.

        Args:
            lr_scheduler_class: its class; or a tuple of classes, of which the user may choose a subclass by its path.
            nested_key: the options' prefix.
            link_to: as of :meth:`add_optimizer_args`.
        """
        self._add_classes(
            lr_scheduler_class, nested_key, (LRScheduler, _PLATEAU), "optimizer"
        )
        self.lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def add_trainer_method_args(
        self,
        trainer_class: type[Any],
        name: str,
        skip: Iterable[str],
    ) -> None:
        """Add the arguments of a method of the Trainer, which are :attr:`method_arguments` from now on.

        Args:
            trainer_class: the Trainer's class.
            name: the method.
            skip: those of its arguments that are no options.
        """
        self.method_arguments = self.add_method_arguments(
            trainer_class, name, skip=set(skip), fail_untyped=False
        )

    def _add_classes(self, kinds: Any, nested_key: str, bases: Any, first: str) -> None:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            if not isinstance(kind, type) or not issubclass(kind, bases):
                raise self.misconfigured(
                    f"{nested_key} must be a subclass of {bases}, or a tuple of such; got {kind!r}"
                )
        options: Any = {"instantiate": False, "fail_untyped": False, "skip": {first}}
        if isinstance(kinds, tuple):
            self.add_subclass_arguments(kinds, nested_key, **options)
        else:
            self.add_class_arguments(kinds, nested_key, sub_configs=True, **options)

    def print_usage(self, file: Any = None) -> None:
        """Print a line; the hundred options would hide an error, and stand in ``--help``."""
        program = self.prog.replace(" [options]", "")
        print(f"usage: {program} [options]", file=file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the options, and which one a misspelt one may be, and end.

        Args:
            message: what is wrong.
            ex: what was raised.
        """
        if "did you mean" not in message:
            message += self._advice(message)
        super().error(message, ex)

    def _advice(self, message: str) -> str:
        """What to write instead of the option or class that a message says there is not."""
        if found := _UNKNOWN_IN_CLASS.search(message):
            return _nearest(found["name"], _parameters_of(found["path"]))
        if found := _UNKNOWN_CLASS.search(message):
            named = [kind.__name__ for kind in NAMED]
            of_torch = [*vars(torch.optim), *vars(torch.optim.lr_scheduler)]
            return _nearest(found["name"], named + of_torch)
        found = _UNKNOWN.search(message)
        if found is None:
            return ""
        option = found["first"] or found["name"] or found["only"]
        if found["group"] is not None:
            option = f"{found['group']}.{option}"
        known = sorted({action.dest for action in _actions_of(self)})
        group, _, name = option.rpartition(".")
        if group == "trainer":
            prefix = f"{group}."
            arguments = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
            return advice_on(name, arguments)
        return _nearest(option, known)


def _actions_of(parser: ArgumentParser) -> Iterator[Any]:
    """The options of a parser, and of those of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _actions_of(subparser)


def _parameters_of(path: str) -> list[str]:
    """The arguments of a class's constructor."""
    module, _, name = path.rpartition(".")
    try:
        return list(signature(getattr(import_module(module), name)).parameters)
    except Exception:
        # The path may be one that only jsonargparse can import.
        return []


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
