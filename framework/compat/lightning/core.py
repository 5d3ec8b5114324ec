"""LightningModule and LightningDataModule."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...datamodule import DataHooks, DataModule
from ...hparams import HyperparametersMixin
from ...loop.optimizers import ManualOptimizer
from ...module import Module
from .files import as_path, read_hparams
from .utilities import MisconfiguredValue, get_filesystem, get_init_args
from .words import in_lightnings_words, may_log

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
    "get_filesystem",
]

LightningOptimizer = ManualOptimizer
# Bases of mixins with hooks, which have no class of their own here.
CheckpointHooks = ModelHooks = Module


class _LightningHyperparameters(HyperparametersMixin):
    """What both classes have of Lightning's names about hyperparameters."""

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    # Programs ask for it before there is one.
    _trainer = None

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

    fabric = None
    # The running hook's name is kept elsewhere.
    _current_fx_name: str | None = None

    @classmethod
    def load_from_checkpoint(
        cls,
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
            ValueError: for a file of hyperparameters of another kind.
        """
        overrides = _taken_by(cls.__init__, overrides)
        if hparams_file is not None:
            saved = read_hparams(hparams_file)
            overrides = {**_taken_by(cls.__init__, saved), **overrides}
        with as_path(checkpoint_path) as path:
            return super().load_from_checkpoint(
                path, map_location, None, strict, weights_only, weight_set, **overrides
            )

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
            raise ValueError(f"method must be 'script' or 'trace'; got {method!r}")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                if method == "script":
                    scripted = torch.jit.script(self, **kwargs)
                else:
                    scripted = torch.jit.trace(
                        self, self._example(example_inputs, "trace"), **kwargs
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
        sample = self._example(input_sample, "export")
        if not isinstance(sample, tuple):
            sample = (sample,)
        was_training = self.training
        self.eval()
        try:
            return torch.onnx.export(self, sample, file_path, **kwargs)
        finally:
            self.train(was_training)

    def _example(self, given: Any, purpose: str) -> Any:
        example = self.example_input_array if given is None else given
        if example is None:
            raise ValueError(
                f"to {purpose} {type(self).__name__}, pass an example of what it takes, or set example_input_array"
            )
        return self.transfer_batch_to_device(example, self.device, 0)


LightningModule.__jit_unused_properties__ = [  # pyright: ignore[reportAttributeAccessIssue] # torch reads it
    *Module.__jit_unused_properties__,  # pyright: ignore[reportAttributeAccessIssue] # as above
    "on_gpu",
]


class LightningDataModule(_LightningHyperparameters, DataModule):
    """A :class:`~loopwright.framework.DataModule` under Lightning's name."""

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    name: str | None = None


def _taken_by(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values by name that a function takes as arguments."""
    parameters = inspect.signature(function).parameters
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}
