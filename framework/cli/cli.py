"""The command line of a program: options and files become a model, data and a Trainer, and one of its methods runs."""

from __future__ import annotations

import inspect
import json
import os
import sys
import typing
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from types import MethodType
from typing import Any, ClassVar

import docstring_parser
from jsonargparse import Namespace
from jsonargparse.typing import class_from_function
from torch.optim import Optimizer

from ..checkpoint.class_paths import CLASS_PATH, INSTANTIATOR, make_of
from ..datamodule import DataModule
from ..module import Module
from ..seed import seed_everything
from ..subclasses import overrides
from ..trainer import Trainer
from .hyperparameters import read_hyperparameters
from .optimizers import (
    SCHEDULERS,
    ReduceLROnPlateau,
    automatic,
    chosen_class,
    instantiate_class,
    link_classes,
)
from .parser import LoopwrightArgumentParser
from .save_config import SaveConfigCallback


class LoopwrightCLI:
    """Makes a program of a Module and a DataModule that is configured by options, YAML files and variables.

    ``LoopwrightCLI(Net, Data)`` at the end of ``train.py`` gives ``python train.py fit --config fit.yaml
    --trainer.max_epochs=3``, with ``validate``, ``test`` and ``predict`` beside ``fit``. ``--help`` lists the options,
    whose types and defaults are those of the constructors, and ``--print_config`` prints them as a file to begin with.
    What was read is written to ``config.yaml`` in the run's folder.

    A subclass may add options in :meth:`add_arguments_to_parser`, and have methods ``before_fit``, ``after_fit`` and so
    on, or ``fit`` in the place of the Trainer's.

    Args:
        model_class: the Module's class, or a function that makes one and says so in its annotation. By default the user
            chooses: ``--model my.package.Net``.
        datamodule_class: the same of the DataModule. By default the user may choose one by ``--data``.
        save_config_callback: the class of the callback that writes the configuration; None for none.
        save_config_kwargs: its further arguments.
        trainer_class: the Trainer's class, or a function that makes one. Default: ``Trainer``.
        trainer_defaults: defaults of its arguments, and ``"callbacks"`` that are there whatever the user says.
        seed_everything_default: a seed; True for that of ``seed_everything()``, False for none.
        parser_kwargs: arguments of the parser, and, by subcommand, of its parser.
        parser_class: the parser's class.
        subclass_mode_model: whether the user may choose a subclass of ``model_class``.
        subclass_mode_data: whether the user may choose a subclass of ``datamodule_class``.
        args: the arguments to read, as a list, or as a dict of what a file would hold. Default: the command line's.
        run: False makes the objects, without subcommands, and runs nothing.
        auto_configure_optimizers: whether ``--optimizer`` and ``--lr_scheduler`` replace ``configure_optimizers``.
        load_from_checkpoint_support: whether ``save_hyperparameters`` keeps what was read in the place of the objects
            that were made of it, so that ``load_from_checkpoint`` can make them again.

    Attributes:
        parser: the parser.
        config: what was read.
        subcommand: which of the Trainer's methods runs, or None.
        config_init: what was read, with the objects that were made of it.
        model, datamodule, trainer: these objects.

    Raises:
        SystemExit: if what was read is not as the constructors say, with status 2 and the reason on standard error.
    """

    trainer_type: ClassVar[type[Any]] = Trainer
    module_type: ClassVar[type[Any]] = Module
    datamodule_type: ClassVar[type[Any]] = DataModule
    parser_type: ClassVar[type[Any]] = LoopwrightArgumentParser
    misconfigured: ClassVar[type[Exception]] = ValueError
    # What checkpoints name to make a module again.
    instantiator: ClassVar[str] = "loopwright.framework.cli.instantiate_module"

    def __init__(
        self,
        model_class: type[Any] | Callable[..., Any] | None = None,
        datamodule_class: type[Any] | Callable[..., Any] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Any] | Callable[..., Any] | None = None,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | None = None,
        parser_class: type[Any] | None = None,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: list[str] | dict[str, Any] | Namespace | None = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class or self.trainer_type
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = parser_kwargs or {}
        self.parser_class = parser_class or self.parser_type
        self.auto_configure_optimizers = auto_configure_optimizers
        self.load_from_checkpoint_support = load_from_checkpoint_support
        self.model_class = model_class
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.datamodule_class = datamodule_class
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data

        of_subcommands = self.subcommands().keys()
        main = {k: v for k, v in self.parser_kwargs.items() if k not in of_subcommands}
        subs = {k: v for k, v in self.parser_kwargs.items() if k in of_subcommands}
        self.setup_parser(run, main, subs)
        self.parse_arguments(self.parser, args)
        self.subcommand = self.config["subcommand"] if run else None
        self._use_hyperparameters_of_checkpoint(args)
        self._seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # The parser.

    def init_parser(self, **kwargs: Any) -> Any:
        """Make a parser; arguments as of its class."""
        kwargs.setdefault("dump_header", [f"loopwright=={version('loopwright')}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action="config",
            help="a configuration file, in YAML or JSON",
        )
        return parser

    def setup_parser(
        self,
        add_subcommands: bool,
        main_kwargs: dict[str, Any],
        subparser_kwargs: dict[str, Any],
    ) -> None:
        """Make the parser, with its subcommands or without, and all arguments.

        Args:
            add_subcommands: whether it has subcommands.
            main_kwargs: arguments of the parser's class.
            subparser_kwargs: the same by subcommand.
        """
        self.parser = self.init_parser(**main_kwargs)
        self.subcommand_parsers: dict[str, Any] = {}
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        subparsers = self.parser.add_subcommands()
        trainer_class: Any = self.trainer_class
        if not isinstance(trainer_class, type):
            trainer_class = class_from_function(trainer_class)
        for name, skip in self.subcommands().items():
            summary = _summary_of(getattr(trainer_class, name))
            kwargs = {"description": summary, **subparser_kwargs.get(name, {})}
            parser = self.init_parser(**kwargs)
            self._add_arguments(parser)
            parser.add_trainer_method_args(trainer_class, name, skip)
            self.subcommand_parsers[name] = parser
            subparsers.add_subcommand(name, parser, help=summary)

    def _add_arguments(self, parser: Any) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizers:
                parser.add_optimizer_args((Optimizer,))
            if not parser.lr_schedulers:
                parser.add_lr_scheduler_args(SCHEDULERS)
        link_classes(parser)

    def add_default_arguments_to_parser(self, parser: Any) -> None:
        """Add ``--seed_everything``.

        Args:
            parser: to which.
        """
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="seed of all random numbers; true for LOOPWRIGHT_SEED or 0, false for none",
        )

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add the arguments of the Trainer, the model and the data.

        Args:
            parser: to which.
        """
        parser.add_loopwright_class_args(self.trainer_class, "trainer")
        defaults = {
            f"trainer.{name}": value
            for name, value in self.trainer_defaults.items()
            if name != "callbacks"
        }
        parser.set_defaults(defaults)
        parser.add_loopwright_class_args(
            self.model_class or self.module_type,
            "model",
            subclass_mode=self.subclass_mode_model,
        )
        parser.add_loopwright_class_args(
            self.datamodule_class or self.datamodule_type,
            "data",
            subclass_mode=self.subclass_mode_data,
            # The model may make the loaders.
            required=self.datamodule_class is not None,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Override to add arguments, or to link some.

        Args:
            parser: to which.
        """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are subcommands, each with those of its arguments that are no options."""
        evaluation = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": evaluation,
            "test": evaluation,
            "predict": evaluation,
        }

    # What was read.

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Read the arguments into :attr:`config`.

        Args:
            parser: which reads.
            args: as of the constructor.
        """
        # A notebook's kernel has arguments of its own.
        is_kernel = "ipykernel" in os.path.basename(sys.argv[0])
        if args is not None and len(sys.argv) > 1 and not is_kernel:
            warnings.warn(
                f"{type(self).__name__}'s args parameter counts, and not the command line: got {args=} and "
                f"{sys.argv[1:]=}",
                stacklevel=3,
            )
        self.config = _parse(parser, args)

    def _use_hyperparameters_of_checkpoint(self, args: Any) -> None:
        """Let the hyperparameters in the checkpoint that is asked for count as the model's defaults."""
        path = self._get(self.config, "ckpt_path") if self.subcommand else None
        hparams = read_hyperparameters(path)
        if not hparams:
            return
        subcommand = str(self.subcommand)
        if CLASS_PATH in hparams:
            class_path = hparams.pop(CLASS_PATH)
            hparams = {"class_path": class_path, "dict_kwargs": hparams}
        try:
            config = self.parser.parse_object(
                {subcommand: {"model": hparams}}, self.config
            )
            # What was said of the model counts for more.
            given = _parse(self.parser, args, defaults=False)
            model = given[subcommand].get("model")
            if model:
                config = self.parser.parse_object(
                    {subcommand: {"model": model}}, config
                )
        except SystemExit:
            print(
                f"Parsing of ckpt_path hyperparameters failed: those in {path}",
                file=sys.stderr,
            )
            raise
        self.config = config

    @cached_property
    def config_dump(self) -> dict[str, Any]:
        """What was read for the subcommand, as plain values, with what links give."""
        text = self.parser.dump(
            self.config, format="json", skip_link_targets=False, skip_unset=False
        )
        dumped = json.loads(text)
        return dumped if self.subcommand is None else dumped[self.subcommand]

    def _get(self, config: Any, key: str, default: Any = None) -> Any:
        """A value that was read for the subcommand."""
        return config.get(str(self.subcommand), config).get(key, default)

    def _parser(self) -> Any:
        """The parser of the subcommand."""
        if self.subcommand is None:
            return self.parser
        return self.subcommand_parsers[self.subcommand]

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is False:
            return
        seed = seed_everything(None if seed is True else seed, workers=True)
        config = (
            self.config if self.subcommand is None else self.config[self.subcommand]
        )
        config["seed_everything"] = seed

    # The objects.

    def before_instantiate_classes(self) -> None:
        """Override to do something before the objects are made."""

    def instantiate_classes(self) -> None:
        """Make the objects."""
        instantiators = []
        if self.load_from_checkpoint_support:
            for key, kind, subclasses in (
                (
                    "model",
                    self.model_class or self.module_type,
                    self.subclass_mode_model,
                ),
                (
                    "data",
                    self.datamodule_class or self.datamodule_type,
                    self.subclass_mode_data,
                ),
            ):
                make = partial(self._make, key)
                instantiators.append((make, _class_made_by(kind), subclasses))
        self.config_init = self.parser.instantiate(
            self.config, instantiators=instantiators
        )
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._replace_configure_optimizers()
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override to do something when they are made."""

    def _make(
        self,
        key: str,
        kind: type[Any],
        *args: Any,
        applied_instantiation_links: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """Make the model or the data, whose hyperparameters are what was read for it."""
        config: dict[str, Any] = self.config_dump.get(key) or {}
        if "class_path" in config:
            config = {
                CLASS_PATH: config["class_path"],
                **config.get("init_args", {}),
                **config.get("dict_kwargs", {}),
            }
        for target, value in applied_instantiation_links.items():
            prefix, _, name = target.partition(".")
            if prefix == key:
                _set_nested(config, name.removeprefix("init_args."), value)
        config = {**config, INSTANTIATOR: self.instantiator}
        return make_of(config, kind, *args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer, with the callbacks that were added.

        Args:
            **kwargs: arguments that count for more than what was read.
        """
        parser = self._parser()
        config = {**self._get(self.config_init, "trainer", {}), **kwargs}
        if "callbacks" not in config:
            warnings.warn(
                f"The `{self.trainer_class.__qualname__}` class does not expose the `callbacks` argument: those of the "
                "command line take no part",
                stacklevel=2,
            )
            return self.trainer_class(**config)
        callbacks = _as_list(config["callbacks"])
        callbacks += [self._get(self.config_init, key) for key in parser.callback_keys]
        callbacks += _as_list(self.trainer_defaults.get("callbacks"))
        if self.save_config_callback and not config.get("fast_dev_run"):
            read = self.config.get(str(self.subcommand), self.config)
            callbacks.append(
                self.save_config_callback(parser, read, **self.save_config_kwargs)
            )
        return self.trainer_class(**{**config, "callbacks": callbacks})

    @staticmethod
    def configure_optimizers(
        lightning_module: Any, optimizer: Any, lr_scheduler: Any = None
    ) -> Any:
        """What the model's ``configure_optimizers`` returns, where the command line names an optimizer.

        Args:
            lightning_module: the model.
            optimizer: the optimizer.
            lr_scheduler: the scheduler, or None.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            config = {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor}
            return {"optimizer": optimizer, "lr_scheduler": config}
        return [optimizer], [lr_scheduler]

    def _replace_configure_optimizers(self) -> None:
        """Let the model use the optimizer and the scheduler that the command line names."""
        parser = self._parser()
        keys = automatic(parser.optimizers)
        scheduler_keys = automatic(parser.lr_schedulers)
        if not self.auto_configure_optimizers or not keys:
            return
        if len(keys) > 1 or len(scheduler_keys) > 1:
            raise self.misconfigured(
                f"at most one optimizer and one lr_scheduler may be 'AUTOMATIC'; got {keys + scheduler_keys}: link "
                "them to arguments of the model by link_to=…, and let its configure_optimizers make them"
            )
        made = self.config_init
        optimizer = chosen_class(parser.optimizers, keys[0], self._get(made, keys[0]))
        if not optimizer:
            return
        scheduler = None
        for key in scheduler_keys:
            scheduler = chosen_class(parser.lr_schedulers, key, self._get(made, key))
        if overrides(self.model, "configure_optimizers", self.module_type):
            warnings.warn(
                f"`{type(self.model).__name__}.configure_optimizers` will be overridden by "
                f"`{type(self).__name__}.configure_optimizers`, as an optimizer is named",
                stacklevel=4,
            )
        configure = _ConfigureOptimizers(
            self.configure_optimizers, optimizer, scheduler
        )
        self.model.configure_optimizers = MethodType(configure, self.model)

    # The run.

    def _run_subcommand(self, subcommand: str) -> None:
        before = getattr(self, f"before_{subcommand}", None)
        if callable(before):
            before()
        run = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)
        run(**self._arguments_of(subcommand))
        after = getattr(self, f"after_{subcommand}", None)
        if callable(after):
            after()

    def _arguments_of(self, subcommand: str) -> dict[str, Any]:
        names = self._parser().method_arguments
        made = self.config_init[subcommand].items()
        arguments = {name: value for name, value in made if name in names}
        arguments["model"] = self.model
        if self.datamodule is not None:
            arguments["datamodule"] = self.datamodule
        return arguments


class _ConfigureOptimizers:
    """A ``configure_optimizers`` of what a command line names; the optimizer is made when it is called.

    By then, a module that makes its layers in ``configure_model`` has parameters, and a strategy may have sharded them.

    Args:
        configure: what returns the two.
        optimizer: the optimizer's class and arguments.
        scheduler: the scheduler's, or None.
    """

    def __init__(
        self,
        configure: Callable[..., Any],
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        self._configure = configure
        self._optimizer = optimizer
        self._scheduler = scheduler

    def __call__(self, module: Any) -> Any:
        optimizer = instantiate_class(module.parameters(), self._optimizer)
        scheduler = None
        if self._scheduler:
            scheduler = instantiate_class(optimizer, self._scheduler)
        return self._configure(module, optimizer=optimizer, lr_scheduler=scheduler)


def _parse(parser: Any, args: Any, **options: Any) -> Any:
    if isinstance(args, (dict, Namespace)):
        return parser.parse_object(args, **options)
    return parser.parse_args(args, **options)


def _summary_of(function: Any) -> str | None:
    return docstring_parser.parse(function.__doc__ or "").short_description


def _class_made_by(kind: Any) -> type[Any]:
    """The class; or the one that a function says it returns."""
    if isinstance(kind, type):
        return kind
    hints = typing.get_type_hints(kind)
    return hints.get("return", inspect.signature(kind).return_annotation)


def _set_nested(config: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        config = config[name]
    config[last] = value


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]
