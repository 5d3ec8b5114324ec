"""Lightning's Trainer: its arguments and attributes, on Loopwright's."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ....callbacks import Callback
from ....callbacks import ModelCheckpoint as NativeModelCheckpoint
from ....callbacks import ModelSummary as NativeModelSummary
from ....callbacks import RichProgressBar as NativeRichProgressBar
from ....callbacks.timer import MaxTime as NativeMaxTime
from ....loggers import Logger
from ....strategies import Precision, Strategy
from ... import trainer as native
from ...datamodule import DataModule
from ...metrics.values import as_floats
from ...module import Module
from ...subclasses import overrides
from . import callbacks, loggers, profilers, strategies
from .accelerators import Accelerator, AcceleratorRegistry, CPUAccelerator
from .callback_checks import check_callbacks
from .callbacks import (
    Checkpoint,
    MaxTime,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
)
from .connectors import CheckpointConnector
from .core import LightningOptimizer, require_one_value
from .files import as_literal
from .loggers import TensorBoardLogger
from .optimizer_dicts import known_keys_only
from .plugins import (
    CheckpointIO,
    ClusterEnvironment,
    LayerSync,
    SLURMEnvironment,
    TorchCheckpointIO,
    WrappingCheckpointIO,
)
from .precisions import precision_plugin
from .profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from .progress import EvaluationLoop, progress
from .runs import (
    check_barebones,
    check_loader_indices,
    check_run,
    print_results,
    require_epochs_left,
    say_if_it_goes_on,
    say_why_it_stopped,
    warn_of_loaders,
    warn_of_missing_predictions,
    without_doubles,
)
from .seed import seed_everything, seed_is_known
from .signatures import also_takes, faces_of
from .strategies import SingleDeviceStrategy, StrategyRegistry, attach
from .utilities import MisconfiguredValue
from .words import lightnings_words, warn

__all__ = ["Trainer", "seed_everything"]

log = logging.getLogger("loopwright")

# Names of strategies that are another one's here.
_STRATEGY_NAMES = {
    "ddp_find_unused_parameters_false": "ddp",
    "ddp_fork": "ddp",
    "ddp_fork_find_unused_parameters_false": "ddp",
    "ddp_fork_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "ddp_notebook": "ddp",
    "ddp_notebook_find_unused_parameters_false": "ddp",
    "ddp_notebook_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "ddp_spawn": "ddp",
    "ddp_spawn_find_unused_parameters_false": "ddp",
    "ddp_spawn_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "single_device": "single",
}


_Plugin = Precision | LayerSync | ClusterEnvironment | CheckpointIO


# In the types of arguments, by class.
_FACES = {
    Callback: faces_of(Callback, callbacks, profilers),
    Logger: faces_of(Logger, loggers),
    Strategy: faces_of(Strategy, strategies),
}


class Trainer(native.Trainer):
    """A :class:`~loopwright.framework.Trainer` that takes the arguments of Lightning's.

    Those that both have mean the same. Logs go to ``lightning_logs``, and a checkpoint is one file. Beside them:

    Args:
        plugins: a precision, or objects that name what Loopwright finds by itself, such as a launcher's environment.
        profiler: also an object.
        enable_autolog_hparams: whether the loggers get the hyperparameters.
        model_registry: must be None.

    Raises:
        NotImplementedError: for what Loopwright does not have, with what to use instead.
    """

    save_format = "file"
    manual_optimizer = LightningOptimizer

    @also_takes(
        native.Trainer.__init__,
        names={"Precision": Precision, "Strategy": Strategy},
        types={"accelerator": str | Accelerator},
        faces=_FACES,
    )
    def __init__(
        self,
        *,
        plugins: _Plugin | list[_Plugin] | None = None,
        profiler: Profiler | Callback | str | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        **arguments: Any,
    ) -> None:
        if model_registry is not None:
            raise NotImplementedError(
                f"model_registry must be None: there is no registry here; got {model_registry!r}"
            )
        arguments = {**_from_environment(), **arguments}
        callbacks = _as_list(arguments.get("callbacks"))
        check_callbacks(arguments, callbacks)
        given_profiler = profiler
        profiler = _profiler(profiler)
        if arguments.get("barebones"):
            check_barebones({**arguments, "profiler": given_profiler})
        measures = not isinstance(profiler, PassThroughProfiler)
        if measures and isinstance(profiler, Callback):
            callbacks.append(profiler)
        arguments = {**arguments, "callbacks": callbacks}
        self._hidden: set[str] = set()
        # Callbacks can be tried on these without a run.
        self._given_metrics: dict[str, torch.Tensor] = {}
        self._tuned_data: Any = None
        self.integers_logged: set[str] = set()
        self._was_asked_to_stop = False
        with lightnings_words():
            _use_plugins(arguments, _as_list(plugins))
            _use_strategy(arguments)
            _use_devices(arguments)
            if arguments.get("overfit_batches"):
                # As there, it goes before these.
                arguments.pop("limit_train_batches", None)
                arguments.pop("limit_val_batches", None)
            _add_defaults(arguments)
            _use_whole_limits(arguments)
            super().__init__(**arguments)
        attach(self.strategy, self)
        self.callbacks = [
            MaxTime(self.max_time) if isinstance(c, NativeMaxTime) else c
            for c in self.callbacks
        ]
        if arguments.get("max_epochs") is None and not self.fast_dev_run:
            # Programs read that it was not given, until a fit begins.
            self.max_epochs = None
        if arguments.get("gradient_clip_val") is None:
            # Hooks are told that nothing was asked for.
            self.gradient_clip_algorithm = arguments.get("gradient_clip_algorithm")
        if self.num_sanity_val_steps == -1:
            self.num_sanity_val_steps = float("inf")
        self.profiler = profiler
        self._autolog_hparams = enable_autolog_hparams
        self._datamodule: Any = None
        self.fit_loop = FitLoop(self)
        self.validate_loop = EvaluationLoop(self, "val")
        self.test_loop = EvaluationLoop(self, "test")
        self.predict_loop = PredictLoop(self)

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a module; as :meth:`loopwright.framework.Trainer.fit`."""
        _require_module(model)
        with self._as_lightning("fit"):
            self._was_asked_to_stop = False
            self._set_max_epochs()
            _require_batches(model)
            if not self._autolog_hparams:
                model.keep_hyperparameters_from_loggers()
            self._require_one_value(model, train_dataloaders, datamodule)
            check_run(self, "fit", model, ckpt_path)
            warn_of_loaders(self, "train", train_dataloaders)
            warn_of_loaders(self, "val", val_dataloaders)
            check_loader_indices("validation", "val", model, val_dataloaders)
            with known_keys_only(model), seed_is_known():
                super().fit(
                    model,
                    train_dataloaders,
                    val_dataloaders,
                    datamodule,
                    ckpt_path,
                    weights_only,
                )
        if ckpt_path is not None:
            require_epochs_left(self)
        say_why_it_stopped(self)

    @contextmanager
    def _as_lightning(self, fn: str) -> Iterator[None]:
        """Run with Lightning's words for errors and warnings, inside a ``with`` block."""
        # What is refused inside of a run does not end it.
        is_inside = self.is_running
        try:
            with lightnings_words(fn):
                yield
        except BaseException:
            if not is_inside:
                # Whatever ends a run early interrupts it, there.
                self.state.end("interrupted")
            raise

    def _set_max_epochs(self) -> None:
        if self.max_epochs is not None:
            return
        if self.max_steps != -1 or self.max_time is not None:
            self.max_epochs = -1
            return
        warn("`max_epochs` was not set. It is 1000 epochs; -1 is for no limit.")
        self.max_epochs = 1000

    def _evaluate(
        self,
        stage: str,
        model: Any,
        dataloaders: Any,
        ckpt_path: Any,
        verbose: bool,
        datamodule: Any,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        _require_module(model, may_be_none=True)
        with self._as_lightning(stage):
            check_run(self, stage, model, ckpt_path)
            prefix = "test" if stage == "test" else "val"
            step = "test" if stage == "test" else "validation"
            warn_of_loaders(self, prefix, dataloaders)
            check_loader_indices(step, prefix, model, dataloaders)
            results = super()._evaluate(
                stage, model, dataloaders, ckpt_path, False, datamodule, weights_only
            )
        results = without_doubles(results)
        if verbose and self.is_global_zero and not self.engine.is_copy and any(results):
            print_results(stage, results)
        return results

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Predict once; as :meth:`loopwright.framework.Trainer.predict`."""
        _require_module(model, may_be_none=True)
        with self._as_lightning("predict"):
            check_run(self, "predict", model, ckpt_path)
            warn_of_loaders(self, "predict", dataloaders)
            check_loader_indices("predict", "predict", model, dataloaders)
            outputs = super().predict(
                model,
                dataloaders,
                datamodule,
                return_predictions,
                ckpt_path,
                weights_only,
            )
        warn_of_missing_predictions(outputs)
        return outputs

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; as :meth:`loopwright.framework.Trainer.save_checkpoint`."""
        with lightnings_words():
            super().save_checkpoint(*args, **kwargs)

    def log_row(self, values: dict[str, Any], step: int | None = None) -> None:
        """Write one row to the loggers.

        As Lightning counts, the row of a training's first step has the number 0, and a value ``step`` in it is used
        as its number.

        Args:
            values: by name.
            step: of the row. None stands for that number, and adds the epoch to the row.
        """
        if not values or not self.loggers or not self.is_global_zero:
            return
        row = as_floats(values)
        if step is None and "step" in row:
            step = int(row.pop("step"))
        elif step is None:
            is_inside_fit = self.state.fn == "fit" and self.is_running
            step = max(self.global_step - is_inside_fit, 0)
            row = {"epoch": self.state.epoch, **row}
        for logger in self.loggers:
            logger.log_metrics(metrics=row, step=step)
        self.record.add_row(step, row)

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """What was logged, but for the step values of evaluations; before the first run, what a program has put in."""
        if self.run is None:
            return self._given_metrics
        values = super().callback_metrics
        return self._as_floats(
            {
                name: value
                for name, value in values.items()
                if name.split("/dataloader_idx_")[0] not in self._hidden
            }
        )

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """What was logged for loggers."""
        return self._as_floats(super().logged_metrics)

    def hide_step_value(self, name: str) -> None:
        """Leave the step value of an evaluation out of :attr:`callback_metrics`."""
        self._hidden.add(name)

    def _as_floats(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values in the dtype that programs compare them in, though means are computed in more digits."""
        dtype = torch.float64 if self.precision == "64-true" else torch.float32
        short = (torch.float16, torch.bfloat16)
        return {
            name: value if value.dtype in short else value.to(dtype)
            for name, value in values.items()
        }

    @property
    def should_stop(self) -> bool:
        """Whether to end the training after this step."""
        return super().should_stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        native.Trainer.should_stop.fset(self, stop)  # type: ignore[attr-defined] # a property has it
        # Somebody may ask at each step.
        if stop and self.is_running and not self._was_asked_to_stop:
            self._was_asked_to_stop = True
            say_if_it_goes_on(self)

    @property
    def strategy(self) -> Any:
        """The strategy; of those that are built in, with Lightning's attributes."""
        return super().strategy

    def _require_one_value(self, model: Any, first: Any, datamodule: Any) -> None:
        """Raise if the loggers would get two values of one hyperparameter."""
        data = first if isinstance(first, DataModule) else datamodule
        if self.loggers and isinstance(model, Module):
            require_one_value(model, data)

    def _copy_with(self, callbacks: list[Callback]) -> Any:
        other: Any = super()._copy_with(callbacks)
        other.fit_loop = FitLoop(other)
        other.predict_loop = PredictLoop(other)
        return other

    @property
    def _checkpoint_connector(self) -> CheckpointConnector:
        return CheckpointConnector(self)

    @property
    def checkpoint_callback(self) -> Any:
        """The first ``ModelCheckpoint``; without one, the first :class:`Checkpoint`, or None."""
        others = (c for c in self.callbacks if isinstance(c, Checkpoint))
        return super().checkpoint_callback or next(others, None)

    def note_tuned_data(self, data: Any) -> None:
        """Tell the training loader that a Tuner has read, until a run has one.

        Args:
            data: a loader, or the module or data module that makes it.
        """
        self._tuned_data = data

    @property
    def train_dataloader(self) -> Any:
        """The training loader; before the first run, that of a Tuner's search."""
        if self.run is not None or self._tuned_data is None:
            return super().train_dataloader
        if isinstance(self._tuned_data, (Module, DataModule)):
            self._tuned_data = self._tuned_data.train_dataloader()
        return self._tuned_data

    @property
    def datamodule(self) -> Any:
        """The data of the running or last run, unless a program has set another."""
        return self._datamodule or super().datamodule

    @datamodule.setter
    def datamodule(self, datamodule: Any) -> None:
        self._datamodule = datamodule

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        kind = self.strategy.device.type
        return AcceleratorRegistry.get(kind) or CPUAccelerator()

    @property
    def _accelerator_connector(self) -> Any:
        """What packages ask of the object that chooses Lightning's devices."""
        return SimpleNamespace(
            strategy=self.strategy,
            accelerator=self.accelerator,
            is_distributed=self.world_size > 1,
            _parallel_devices=[self.strategy.device],
        )

    @property
    def precision_plugin(self) -> Precision:
        """The precision."""
        return precision_plugin(self.engine.precision)

    @property
    def scaler(self) -> Any:
        """The loss scaler of ``"16-mixed"``, or None."""
        return self.engine.scaler

    @property
    def log_dir(self) -> Any:
        """The first logger's folder of this run; of a logger that has none, where it keeps all of them."""
        logger = self.logger
        if logger is None or logger.log_dir is not None:
            return super().log_dir
        return logger.save_dir

    @property
    def received_sigterm(self) -> bool:
        """Whether a signal has asked the training to end."""
        return bool(self.consensus.signal_requested)

    @property
    def val_check_batch(self) -> int | float | None:
        """After how many training batches a validation is due; infinite if an epoch's end cannot be foreseen."""
        if self.validation_interval is not None:
            return None
        interval = self.val_check_interval
        batches = self.num_training_batches
        if isinstance(interval, int) or batches == float("inf"):
            return interval if isinstance(interval, int) else batches
        return max(1, int(batches * interval))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """This process's index and the number of processes, for a ``DistributedSampler``."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make a module on the device, in the run's precision, inside a ``with`` block.

        Args:
            empty_init: leave parameters without values, for a checkpoint that is loaded afterwards.
        """
        dtype = torch.get_default_dtype()
        with ExitStack() as stack:
            stack.enter_context(torch.device(self.strategy.device))
            if empty_init:
                stack.enter_context(_NoInit())
            torch.set_default_dtype(self.engine.precision.parameters or dtype)
            stack.callback(torch.set_default_dtype, dtype)
            yield


class _NoInit(torch.overrides.TorchFunctionMode):
    """Leaves tensors alone that the functions of ``torch.nn.init`` are called with."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class FitLoop:
    """What programs read and set of Lightning's ``trainer.fit_loop``.

    Args:
        trainer: whose training it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.val_loop = EvaluationLoop(trainer, "val")

    @property
    def max_epochs(self) -> int | None:
        """The Trainer's argument."""
        return self._trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, epochs: int | None) -> None:
        self._trainer.max_epochs = epochs

    @property
    def min_epochs(self) -> int | None:
        """The Trainer's argument."""
        return self._trainer.min_epochs

    @property
    def max_steps(self) -> int:
        """The Trainer's argument."""
        return self._trainer.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._trainer.max_steps = steps

    @property
    def restarting(self) -> bool:
        """Whether a run that resumes repeats the end of an epoch first, which none does here."""
        return False

    @property
    def _skip_backward(self) -> bool:
        """Whether this epoch only computes the statistics of batch norms, for which there is no epoch here."""
        return False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        trainer = self._trainer
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            return True
        limit = trainer.max_epochs
        if limit not in (None, -1) and trainer.current_epoch >= limit:
            return True
        return trainer.should_stop

    @property
    def _batches_that_stepped(self) -> int:
        """Accumulation windows so far, which is what loggers count."""
        return self._trainer.global_step

    @property
    def max_batches(self) -> int | float:
        """Training batches in an epoch."""
        return self._trainer.num_training_batches

    @property
    def batch_idx(self) -> int:
        """Batches of this epoch that are finished: the running one's index, until its step has ended."""
        return self._trainer.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """Batches since the beginning, but for the running one."""
        return self._trainer.state.total_batches

    @property
    def epoch_loop(self) -> FitLoop:
        """The same object: the counters of an epoch."""
        return self

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self._trainer.global_step

    @property
    def epoch_progress(self) -> Any:
        """The epoch's index, as ``epoch_progress.current.completed`` and its siblings."""
        return progress(self._trainer.current_epoch)

    @property
    def batch_progress(self) -> Any:
        """The batch's index, as ``batch_progress.current.ready`` and its siblings."""
        return progress(self._trainer.batch_idx, self.total_batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        counters = (self.epoch_progress, self.batch_progress)
        names = ("epoch_progress", "epoch_loop.batch_progress")
        return {
            name: {"total": vars(each.total), "current": vars(each.current)}
            for name, each in zip(names, counters, strict=True)
        }


class PredictLoop:
    """What programs read of Lightning's ``trainer.predict_loop``.

    Args:
        trainer: which predicts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def num_dataloaders(self) -> int:
        """How many loaders are predicted."""
        loaders = self._trainer.predict_dataloaders
        return len(loaders) if isinstance(loaders, (list, tuple)) else 1

    @property
    def max_batches(self) -> list[int | float]:
        """Batches of each loader."""
        return self._trainer.num_predict_batches

    @property
    def current_batch_indices(self) -> list[Any]:
        """Indices of the running batch's samples in the dataset, as far as they are known."""
        return self._trainer.predict_batch_indices or []


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    # Also a list of another library, such as OmegaConf's.
    return list(given) if isinstance(given, Sequence) else [given]


def _require_module(model: Any, may_be_none: bool = False) -> None:
    """Raise a TypeError for what cannot be run."""
    if model is None and may_be_none:
        return
    # Importing torch's compiler takes half a second.
    if isinstance(model, Module):
        return
    if not isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            f"`model` must be a `LightningModule` or `torch._dynamo.OptimizedModule`, got `{type(model).__qualname__}`"
        )


def _require_batches(model: Any) -> None:
    """Raise a NotImplementedError for a ``training_step`` that wants to read the loader itself."""
    step = getattr(model, "training_step", None)
    if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
        raise NotImplementedError(
            f"{type(model).__name__}.training_step takes dataloader_iter, and a step is given a batch here: define "
            "training_step(batch, batch_idx)"
        )


def _profiler(given: Any) -> Any:
    """The object that programs call as ``trainer.profiler``, which measures nothing where none was asked for.

    Raises:
        ValueError: for another name.
    """
    kinds = {
        None: PassThroughProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": PyTorchProfiler,
        "simple": SimpleProfiler,
    }
    if given is not None and not isinstance(given, str):
        return given
    if given not in kinds:
        raise MisconfiguredValue(
            "When passing a name as `profiler`, it can only be one of 'simple', 'advanced' and 'pytorch'; "
            f"got {given!r}"
        )
    return kinds[given]()


def _use_plugins(arguments: dict[str, Any], plugins: list[Any]) -> None:
    """Turn plugins into the arguments that ask for the same.

    Raises:
        NotImplementedError: for one whose work nothing does here.
        TypeError: for what is no plugin.
    """
    for plugin in plugins:
        if isinstance(plugin, Precision):
            arguments["precision"] = plugin
        elif isinstance(plugin, LayerSync):
            arguments["sync_batchnorm"] = True
        elif isinstance(plugin, SLURMEnvironment):
            arguments["auto_requeue"] = plugin.auto_requeue
        elif isinstance(plugin, ClusterEnvironment):
            log.info(
                "plugins: %s changes nothing, as a launcher is found without it",
                type(plugin).__name__,
            )
        elif isinstance(plugin, CheckpointIO):
            _require_own_writing(plugin)
        else:
            raise TypeError(
                f"plugins must hold a Precision, a LayerSync or a ClusterEnvironment; got {plugin!r}"
            )


def _require_own_writing(plugin: CheckpointIO) -> None:
    """Leave a CheckpointIO out that only reads in another way.

    Raises:
        NotImplementedError: for one that writes.
    """
    while isinstance(plugin, WrappingCheckpointIO):
        plugin = plugin.checkpoint_io
    if overrides(plugin, "save_checkpoint", TorchCheckpointIO):
        raise NotImplementedError(
            f"plugins: {type(plugin).__name__} writes no checkpoint here; for another store, pass an fsspec URL "
            "as ModelCheckpoint(dirpath=…)"
        )
    log.info(
        "plugins: %s reads no checkpoint here, where reading runs no code unless weights_only=False",
        type(plugin).__name__,
    )


def _use_strategy(arguments: dict[str, Any]) -> None:
    """Make a strategy of a name that only Lightning knows, or that a package has registered."""
    strategy = arguments.get("strategy", "auto")
    if not isinstance(strategy, str):
        return
    name = _STRATEGY_NAMES.get(strategy, strategy)
    if name != strategy:
        log.info("strategy=%r is %r here", strategy, name)
    is_of_package = StrategyRegistry.is_of_package(name)
    arguments["strategy"] = StrategyRegistry.get(name) if is_of_package else name


def _use_devices(arguments: dict[str, Any]) -> None:
    """Name the accelerator, and the device that a SingleDeviceStrategy was given."""
    accelerator = arguments.get("accelerator", "auto")
    if isinstance(accelerator, Accelerator):
        accelerator = accelerator.name()
    strategy = arguments.get("strategy")
    if isinstance(strategy, SingleDeviceStrategy) and accelerator == "auto":
        device = torch.device(strategy.requested_device)
        accelerator = device.type
        if device.index is not None:
            arguments.setdefault("devices", [device.index])
    if isinstance(strategy, SingleDeviceStrategy):
        arguments.setdefault("devices", 1)
    arguments["accelerator"] = accelerator
    # True is what everybody gets who does not say: the processes find out for each loader.
    if arguments.get("use_distributed_sampler") is True:
        arguments["use_distributed_sampler"] = None


def _from_environment() -> dict[str, Any]:
    """Arguments that variables such as ``PL_TRAINER_MAX_EPOCHS`` give, for those that are not passed."""
    names = inspect.signature(native.Trainer.__init__).parameters
    variables = {name: f"PL_TRAINER_{name.upper()}" for name in names}
    return {
        name: as_literal(os.environ[variable])
        for name, variable in variables.items()
        if variable in os.environ
    }


def _use_whole_limits(arguments: dict[str, Any]) -> None:
    """Read a float such as 1e6, for a limit, as a number of batches."""
    for name in ("train", "val", "test", "predict"):
        limit = arguments.get(f"limit_{name}_batches")
        if isinstance(limit, float) and limit > 1 and limit.is_integer():
            arguments[f"limit_{name}_batches"] = int(limit)


def _add_defaults(arguments: dict[str, Any]) -> None:
    """Add the callbacks and the logger that a Trainer makes by itself, of the classes that programs look for."""
    if arguments.get("barebones"):
        return
    callbacks = arguments["callbacks"]
    has_summary = any(isinstance(c, NativeModelSummary) for c in callbacks)
    if has_summary:
        # False asks for none beside it.
        arguments.pop("enable_model_summary", None)
    if arguments.get("fast_dev_run"):
        # It saves nothing then. Programs ask it for its path nevertheless.
        if arguments.get("enable_checkpointing") is not False:
            _add_checkpoint(arguments, callbacks)
        return
    if arguments.get("logger") in (None, True):
        folder = arguments.get("default_root_dir") or os.getcwd()
        arguments["logger"] = TensorBoardLogger(folder)
    if arguments.get("enable_checkpointing") is not False:
        _add_checkpoint(arguments, callbacks)
    if not has_summary and arguments.get("enable_model_summary") is not False:
        is_rich = any(isinstance(c, NativeRichProgressBar) for c in callbacks)
        callbacks.append(RichModelSummary() if is_rich else ModelSummary())


def _add_checkpoint(arguments: dict[str, Any], callbacks: list[Any]) -> None:
    """Add a ModelCheckpoint, unless something saves already."""
    if not any(isinstance(c, NativeModelCheckpoint | Checkpoint) for c in callbacks):
        callbacks.append(ModelCheckpoint())
    elif not any(isinstance(c, NativeModelCheckpoint) for c in callbacks):
        # A Checkpoint of another kind saves: no ModelCheckpoint is made beside it.
        arguments["enable_checkpointing"] = False
