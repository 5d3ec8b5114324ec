"""LightningModule and LightningDataModule."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...data.iteration import is_map_style
from ...datamodule import DataHooks, DataModule
from ...hparams import HyperparametersMixin
from ...loop.optimizers import ManualOptimizer
from ...module import Module
from ...subclasses import overrides
from ..imports import unserved
from .files import as_path, read_hparams
from .model_helpers import of_class
from .utilities import (
    MisconfigurationException,
    MisconfiguredValue,
    get_filesystem,
    get_init_args,
)
from .words import in_lightnings_words, may_log, warn_of_integers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CheckpointHooks",
    "DataHooks",
    "HyperparametersMixin",
    "LightningDataModule",
    "LightningModule",
    "LightningOptimizer",
    "ModelHooks",
    "_TrainerFabricShim",
    "_load_from_checkpoint",
    "get_filesystem",
]

log = logging.getLogger("loopwright")


class LightningOptimizer(ManualOptimizer):
    """What ``self.optimizers()`` gives; or a wrapper around an optimizer of one's own, which steps by itself.

    Args:
        optimizer: the optimizer.
        owner: what trains in this fit; None outside of one.
    """

    def __init__(self, optimizer: Any, owner: Any = None) -> None:
        super().__init__(optimizer, owner)
        self._is_owned = owner is not None

    @property
    def _optimizer(self) -> Any:
        return self.optimizer

    def __repr__(self) -> str:
        return f"Lightning{self.optimizer!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step; arguments as of :class:`~loopwright.framework.loop.optimizers.ManualOptimizer`."""
        if self._is_owned:
            return super().step(closure, **kwargs)
        return self.optimizer.step(closure, **kwargs)


_TrainerFabricShim = unserved("_TrainerFabricShim", "there is no Fabric here")

# Bases of mixins with hooks, which have no class of their own here.
CheckpointHooks = ModelHooks = Module


_TO_TRACE = "method='trace' requires either `example_inputs` or `model.example_input_array` to be defined"
_TO_EXPORT = "Could not export to ONNX since neither `input_sample` nor `model.example_input_array` attribute is set."


class _LightningHyperparameters(HyperparametersMixin):
    """What both classes have of Lightning's names about hyperparameters."""

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    # Programs ask for it before there is one.
    _trainer = None

    @property
    def _hparams_name(self) -> str | None:
        """The constructor's argument that holds the hyperparameters: ``"kwargs"`` if each is one, None without any."""
        if not self.hparams:
            return None
        whole = (self.hparams_call or {}).get("whole")
        return whole[0] if whole else "kwargs"

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Any = None,
        frame: Any = None,
        logger: bool = True,
    ) -> None:
        """Keep the constructor's arguments in ``hparams``; arguments as of :class:`HyperparametersMixin`.

        Args:
            *args: names of arguments to keep, or one object.
            ignore: names of arguments to leave out.
            frame: take the arguments from the frame of this constructor, which Loopwright otherwise needs no frame for.
            logger: whether loggers get them.
        """
        if frame is not None and not args:
            ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
            arguments = get_init_args(frame)
            args = ({k: v for k, v in arguments.items() if k not in ignored},)
        try:
            super().save_hyperparameters(*args, ignore=ignore, logger=logger)
        except TypeError as error:
            raise in_lightnings_words(error) from error.__cause__

    def keep_hyperparameters_from_loggers(self) -> None:
        """Let no logger get them."""
        self.logs_hparams = False


class LightningModule(_LightningHyperparameters, Module):
    """A :class:`~loopwright.framework.Module` under Lightning's name."""

    # Nobody sets it but programs, as there is no Fabric here.
    _fabric: Any = None
    # The running hook's name is kept elsewhere.
    _current_fx_name: str | None = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the main process, through the progress bar if there is one."""
        bar = self.trainer.progress_bar_callback
        if self.global_rank == 0 and bar is not None and bar.is_enabled:
            bar.print(*args, **kwargs)
        else:
            super().print(*args, **kwargs)

    @property
    def fabric(self) -> Any:
        """What a program has set here, for this module and those in it."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        for module in self.modules():
            if isinstance(module, LightningModule):
                module.__dict__["_fabric"] = fabric

    # Packages ask whether TorchScript is being made, which there needs it.
    _jit_is_scripting = False

    # What torch.compile made of forward, if programs ask for that by Lightning's functions.
    _compiler_ctx: dict[str, Any] | None = None

    def note_compiled_calls(self, forward: Any) -> None:
        """Let calls run a compiled forward from now on; None undoes that."""
        self._compiler_ctx = None if forward is None else {"compiler": "dynamo"}
        vars(self)["_compiled_call_impl"] = forward

    @property
    def calls_are_compiled(self) -> bool:
        """Whether calls run a compiled forward, by :meth:`note_compiled_calls`."""
        return self._compiler_ctx is not None

    # None until somebody says so.
    _strict_loading: bool | None = None

    @property
    def strict_loading(self) -> bool:
        """Whether checkpoints must hold exactly this module's parameters and buffers; by default yes."""
        return self._strict_loading is not False

    @strict_loading.setter
    def strict_loading(  # pyright: ignore[reportIncompatibleVariableOverride] # it may be set
        self, strict: bool | None
    ) -> None:
        self._strict_loading = strict

    @of_class
    def load_from_checkpoint(
        cls,  # noqa: N805 # it is a classmethod
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        weight_set: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the module from a checkpoint; as :meth:`loopwright.framework.Module.load_from_checkpoint`.

        Args:
            checkpoint_path: also an open file.
            map_location: as there.
            hparams_file: a file of hyperparameters, ``.yaml`` or ``.csv``, that go before those of the checkpoint.
            strict: as there.
            weights_only: as there.
            weight_set: as there.
            **overrides: as there; they go before the file's. Those that the constructor does not take are left out.

        Raises:
            ValueError: for a file of hyperparameters of another kind, or if ``strict`` is another than the module's
                own ``strict_loading``.
        """
        taken = _taken_by(cls.__init__, overrides)
        if len(taken) < len(overrides):
            log.warning(
                "load_from_checkpoint: %s.__init__ does not take %s, which is left out",
                cls.__name__,
                ", ".join(overrides.keys() - taken.keys()),
            )
        overrides = taken
        if hparams_file is not None:
            saved = read_hparams(hparams_file)
            overrides = {**_taken_by(cls.__init__, saved), **overrides}
        with as_path(checkpoint_path) as path:
            module = super().load_from_checkpoint(
                path, map_location, None, strict, weights_only, weight_set, **overrides
            )
        own = module._strict_loading
        if None not in (strict, own) and strict != own:
            raise ValueError(
                f"load_from_checkpoint(strict={strict}) is in conflict with {cls.__name__}.strict_loading={own}"
            )
        return module

    def clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters, by default as the Trainer's arguments say.

        Args:
            optimizer: the optimizer.
            gradient_clip_val: the bound.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Raises:
            MisconfigurationException: if the Trainer has been given another value.
        """
        given = {
            "gradient_clip_val": gradient_clip_val,
            "gradient_clip_algorithm": gradient_clip_algorithm,
        }
        for name, value in given.items():
            of_trainer = getattr(self.trainer, name)
            if value is None:
                given[name] = of_trainer
            elif of_trainer is not None and value != of_trainer:
                raise MisconfigurationException(
                    f"You have set `Trainer({name}={of_trainer!r})` and have passed "
                    f"`clip_gradients({name}={value!r})`: one of them is enough"
                )
        super().clip_gradients(optimizer, **given)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool | None = None,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a number; arguments as of :meth:`loopwright.framework.Module.log`.

        Raises:
            MisconfigurationException: for a name that ends as those of several loaders do.
        """
        trainer: Any = self.__dict__.get("_trainer")
        if not may_log(trainer, name, logger):
            return
        if add_dataloader_idx and "/dataloader_idx_" in name:
            raise MisconfiguredValue(
                f"You called `self.log` with the key `{name}` but it should not contain information about "
                "`dataloader_idx` when `add_dataloader_idx=True`"
            )
        if on_step and trainer.evaluating:
            trainer.hide_step_value(name if on_epoch is False else f"{name}_step")
        if isinstance(reduce_fx, str):
            reduce_fx = reduce_fx.lower()
        if isinstance(value, torch.Tensor):
            warn_of_integers(trainer, name, value)
        try:
            super().log(
                name,
                value,
                prog_bar,
                logger,
                on_step,
                on_epoch,
                reduce_fx,
                enable_graph,
                sync_dist,
                sync_dist_group,
                add_dataloader_idx,
                batch_size,
                metric_attribute,
                rank_zero_only,
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise in_lightnings_words(error) from error.__cause__

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; as :meth:`loopwright.framework.Module.configure_gradient_clipping`."""
        # By name, as overrides of the other one may have arguments between.
        self.clip_gradients(
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )

    @property
    def on_gpu(self) -> bool:
        """Whether its parameters are on a CUDA device."""
        return self.device.type == "cuda"

    def to_torchscript(
        self,
        file_path: str | os.PathLike[str] | None = None,
        method: str | None = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compile the module's forward for TorchScript, in evaluation mode.

        Args:
            file_path: where to save it, a path or an fsspec URL. Default: nowhere.
            method: ``"script"`` or ``"trace"``.
            example_inputs: what to trace with. Default: ``example_input_array``.
            **kwargs: of ``torch.jit.script`` or ``torch.jit.trace``.

        Raises:
            ValueError: for another method, or without an example to trace with.
        """
        if method not in ("script", "trace"):
            raise ValueError(
                f"to_torchscript only supports 'script' or 'trace' as method; got {method!r}"
            )
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                if method == "script":
                    scripted = torch.jit.script(self, **kwargs)
                else:
                    scripted = torch.jit.trace(
                        self, self._example(example_inputs, _TO_TRACE), **kwargs
                    )
        finally:
            self.train(was_training)
        if file_path is not None:
            with get_filesystem(file_path).open(str(file_path), "wb") as file:
                torch.jit.save(scripted, file)
        return scripted

    def to_onnx(self, file_path: Any, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export the module's forward to ONNX, in evaluation mode, by ``torch.onnx.export``.

        Args:
            file_path: where to save it.
            input_sample: an example of what it takes. Default: ``example_input_array``.
            **kwargs: of ``torch.onnx.export``.

        Raises:
            ValueError: without an example.
        """
        sample = self._example(input_sample, _TO_EXPORT)
        if not isinstance(sample, tuple):
            sample = (sample,)
        was_training = self.training
        self.eval()
        try:
            return torch.onnx.export(self, sample, file_path, **kwargs)
        finally:
            self.train(was_training)

    def _example(self, given: Any, problem: str) -> Any:
        example = self.example_input_array if given is None else given
        if example is None:
            raise ValueError(problem)
        return self.transfer_batch_to_device(example, self.device, 0)


LightningModule.__jit_unused_properties__ = [  # pyright: ignore[reportAttributeAccessIssue] # torch reads it
    *Module.__jit_unused_properties__,  # pyright: ignore[reportAttributeAccessIssue] # as above
    "_hparams_name",
    "calls_are_compiled",
    "fabric",
    "on_gpu",
    "strict_loading",
]


class LightningDataModule(_LightningHyperparameters, DataModule):
    """A :class:`~loopwright.framework.DataModule` under Lightning's name."""

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    name: str | None = None

    @of_class
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride] # Lightning's order
        cls,  # noqa: N805 # it is a classmethod
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the data from a checkpoint; as :meth:`loopwright.framework.DataModule.load_from_checkpoint`.

        Args:
            checkpoint_path: also an open file.
            map_location: accepted for familiarity; data has no device.
            hparams_file: a file of hyperparameters, ``.yaml`` or ``.csv``, that go before those of the checkpoint.
            weights_only: as there.
            **overrides: as there; they go before the file's.

        Raises:
            ValueError: for a file of hyperparameters of another kind.
        """
        if hparams_file is not None:
            saved = read_hparams(hparams_file)
            overrides = {**_taken_by(cls.__init__, saved), **overrides}
        with as_path(checkpoint_path) as path:
            return super().load_from_checkpoint(path, weights_only, **overrides)

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Make one of datasets; arguments as of :meth:`loopwright.framework.DataModule.from_datasets`.

        The class's constructor gets ``batch_size`` and ``num_workers``, too, if it takes them.
        """
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        make = partial(cls, **_taken_by(cls.__init__, sizes))
        return DataModule.from_datasets.__func__(
            make,
            train_dataset,
            val_dataset,
            test_dataset,
            predict_dataset,
            batch_size,
            num_workers,
            **kwargs,
        )

    def __str__(self) -> str:
        parts = {
            "Train": "train_dataloader",
            "Validation": "val_dataloader",
            "Test": "test_dataloader",
            "Predict": "predict_dataloader",
        }
        lines = []
        for title, name in parts.items():
            sizes = "None"
            if overrides(self, name, DataModule):
                sizes = _sizes_of(getattr(self, name)())
            lines.append(f"{{{title} dataloader: {sizes}}}")
        return "\n".join(lines)


def _sizes_of(loaders: Any) -> str:
    """How many samples loaders have, as text."""
    if isinstance(loaders, Mapping):
        return " ; ".join(f"{key}: {_sizes_of(item)}" for key, item in loaders.items())
    if isinstance(loaders, (list, tuple)):
        numbered = enumerate(loaders, start=1)
        return " ; ".join(f"{number}. {_sizes_of(item)}" for number, item in numbered)
    size = len(loaders.dataset) if is_map_style(loaders) else "NA"  # type: ignore[arg-type] # it has one
    return f"size={size}"


def require_one_value(module: Any, datamodule: Any) -> None:
    """Raise if a module and its data have a hyperparameter of one name that loggers get, with two values.

    Raises:
        RuntimeError: naming them.
    """
    if datamodule is None or not (module.logs_hparams and datamodule.logs_hparams):
        return
    first = module.hparams_initial
    second = datamodule.hparams_initial
    # A command line notes under names with an underscore how it has made each of the two.
    unequal = [
        name
        for name in first.keys() & second.keys()
        if not str(name).startswith("_") and not _is_same(first[name], second[name])
    ]
    if unequal:
        raise RuntimeError(
            f"Error while merging hparams: the keys {unequal} are present in both the LightningModule's and "
            "LightningDataModule's hparams but have different values."
        )


def _is_same(first: Any, second: Any) -> bool:
    return first is second or repr(first) == repr(second)


def _taken_by(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values by name that a function takes as arguments."""
    parameters = inspect.signature(function).parameters
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}


def load_module_or_data(
    cls: Any,
    checkpoint_path: Any,
    map_location: Any = None,
    hparams_file: Any = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Construct a module of a class from a checkpoint, for packages whose class overrides ``load_from_checkpoint``."""
    load = LightningModule.load_from_checkpoint.__func__
    if issubclass(cls, LightningDataModule):
        load = LightningDataModule.load_from_checkpoint.__func__
        return load(
            cls, checkpoint_path, map_location, hparams_file, weights_only, **kwargs
        )
    return load(
        cls,
        checkpoint_path,
        map_location,
        hparams_file,
        strict,
        weights_only,
        **kwargs,
    )


_load_from_checkpoint = load_module_or_data
