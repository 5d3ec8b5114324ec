"""The Trainer: owns a run from its arguments to its end."""

from __future__ import annotations

import inspect
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from .. import callbacks as builtin_callbacks
from .. import loggers as builtin_loggers
from ..callbacks.base import Callback
from ..loggers.base import Logger
from ..strategies.launch.failures import clear_failure, record_failure
from ..strategies.tensor_shards import full_state
from .arguments import (
    check_choice,
    check_clipping,
    check_count,
    check_interval,
    check_limit,
    check_max_time,
    names_arguments,
)
from .attributes import TrainerAttributes
from .checkpoint.configs import portable
from .checkpoint.find import is_taken
from .checkpoint.folder_claims import claim_folder, release_folders
from .checkpoint.saver import Save
from .checkpoint.schema import RunState
from .checkpoint.storage import plain
from .checkpoint.weights import export_weights
from .checkpoint.writer import remove_checkpoint, write_pointer
from .data.iteration import INFINITE
from .data.sharding import data_place
from .datamodule import DataModule
from .engine.engine import Engine
from .engine.explanations import needs_closure
from .engine.launch_settings import launched_accumulation
from .errors import exchange, in_main_process
from .lifecycle.attachment import attached
from .lifecycle.checkpoint import (
    can_save_alone,
    read_run,
    restore_module,
    restore_run,
    restore_start,
    save_run,
)
from .lifecycle.checks import check_run, names_in_eval_mode
from .lifecycle.compile import compile_submodules
from .lifecycle.processes import CarriedFit, Run, run_in_processes
from .lifecycle.signals import Signals
from .loop.consensus import Control
from .loop.evaluate import evaluate, predict
from .loop.fit import fit
from .loop.hooks import CallbackBus, check_callback, order_callbacks
from .loop.loaders import RunData
from .loop.optimizers import parse_optimizers
from .loop.step import Optimization, check_schedulers
from .messages import configure, log
from .metrics.metric_state import metric_states, own_metrics
from .metrics.metrics import Metrics
from .metrics.values import as_floats
from .module import Module
from .names import check_loggers, overrides

if TYPE_CHECKING:
    from ..strategies import Precision, Strategy
    from .loop.optimizers import LRSchedulerConfig

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class Trainer(TrainerAttributes):
    """Runs a :class:`~loopwright.framework.Module` on data.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or ``"xpu"``.
        strategy: a name, or a :class:`~loopwright.strategies.Strategy`.
        devices: a count, a list of indices, ``"auto"`` or -1 (all). With several, there is a process for each.
        num_nodes: number of machines, or ``"auto"``: as many as a launcher says, else 1.
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``, ``"64-true"``, or a
            :class:`~loopwright.strategies.Precision`. Default: ``"32-true"``, or what ``accelerate launch`` says.
        logger: a logger, a list of them, True (TensorBoard under ``default_root_dir``) or False.
        callbacks: a callback or a list of them.
        fast_dev_run: True or a number: run that many batches of everything, once, without logger and checkpoints.
        max_epochs: stop after so many epochs; -1 for no limit. Default: 1000, or none if ``max_steps`` or ``max_time``
            is given.
        min_epochs: train at least so many epochs, whoever asks to stop.
        max_steps: stop after so many optimizer steps; -1 for no limit.
        min_steps: train at least so many optimizer steps.
        max_time: stop after this time: ``"DD:HH:MM:SS"``, a ``timedelta``, or a dict of its arguments.
        limit_train_batches: run so many batches an epoch (int), or this fraction of them (float), in each process.
            Default: all.
        limit_val_batches: the same for validation, for each loader; here, of all processes together, unless the loader
            gives each its own part.
        limit_test_batches: the same for testing.
        limit_predict_batches: the same for prediction.
        overfit_batches: train and validate on so many batches (int) or this fraction (float), unshuffled.
        val_check_interval: validate every so many training batches (int), or after this fraction of an epoch (float).
        check_val_every_n_epoch: validate in every n-th epoch only; None counts ``val_check_interval`` over epochs.
        num_sanity_val_steps: validation batches to run before training; -1 for all.
        log_every_n_steps: write step values to the loggers every so many optimizer steps.
        enable_checkpointing: save checkpoints (a default ``ModelCheckpoint`` if none is given). Default: True.
        enable_progress_bar: show a progress bar. Default: True.
        enable_model_summary: print a table of the model before training. Default: True.
        accumulate_grad_batches: micro-batches per optimizer step; the last window of an epoch holds what is left.
        micro_batch: run each batch in parts of at most so many samples, one after the other, with the gradient of the
            whole batch; ``"auto"`` begins with all of it and halves the part whenever memory runs out, in all processes
            together. For automatic optimization, under the strategies "single" and "ddp".
        gradient_clip_val: clip gradients to this.
        gradient_clip_algorithm: ``"norm"`` (default) or ``"value"``.
        deterministic: use deterministic algorithms; ``"warn"`` warns where there is none.
        benchmark: let cuDNN try out algorithms. Default: torch's own setting.
        inference_mode: evaluate under ``torch.inference_mode`` rather than ``torch.no_grad`` (outside of ``fit``).
        use_distributed_sampler: deal the batches of each loader out to the processes; False if each process makes a
            loader for its own part of the data. By default they find out for each loader.
        profiler: ``"simple"`` or ``"pytorch"``.
        detect_anomaly: raise at the first loss that is not finite, and let autograd name the operation.
        barebones: switch off all that is not the loop: logger, checkpoints, bar, summary, sanity check, ``log``.
        sync_batchnorm: let batch norms compute their statistics over all processes.
        reload_dataloaders_every_n_epochs: make the loaders again every so many epochs; 0 for never.
        default_root_dir: where logs and checkpoints go. Default: the working directory.
        compile: compile the module's submodules in place; a dict gives ``torch.compile``'s arguments.

    Raises:
        ValueError, TypeError: for arguments that are not as described.
    """

    @names_arguments
    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int | str = "auto",
        precision: int | str | Precision | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: Callback | list[Callback] | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        micro_batch: int | str | None = None,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool | None = None,
        profiler: str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        configure()
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps)):
            check_count(name, value, -1, (None,) if name == "max_epochs" else ())
        for name, value in (("min_epochs", min_epochs), ("min_steps", min_steps)):
            check_count(name, value, 0, (None,))
        check_count("fast_dev_run", fast_dev_run, 0, (True, False))
        check_count("check_val_every_n_epoch", check_val_every_n_epoch, 1, (None,))
        check_count("num_sanity_val_steps", num_sanity_val_steps, -1, (None,))
        check_count("log_every_n_steps", log_every_n_steps, 0, (None,))
        check_count("accumulate_grad_batches", accumulate_grad_batches, 1)
        check_count("micro_batch", micro_batch, 1, (None, "auto"))
        self.micro_batch = micro_batch
        check_count(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, 0
        )
        check_max_time(max_time)
        check_choice("deterministic", deterministic, (None, True, False, "warn"))
        check_choice("profiler", profiler, (None, "simple", "pytorch"))
        self._accumulate_grad_batches = launched_accumulation(
            "accumulate_grad_batches", accumulate_grad_batches
        )
        self.gradient_clip_algorithm = check_clipping(
            gradient_clip_val, gradient_clip_algorithm
        )
        self.gradient_clip_val = gradient_clip_val
        self.val_check_interval = check_interval(
            val_check_interval, check_val_every_n_epoch
        )
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.overfit_batches = check_limit("overfit_batches", overfit_batches)
        if self.overfit_batches:
            if limit_train_batches is not None:
                raise ValueError(
                    "overfit_batches and limit_train_batches set the same; pass one of them"
                )
            limit_train_batches = self.overfit_batches
            limit_val_batches = (
                self.overfit_batches if limit_val_batches is None else limit_val_batches
            )
        self.limit_train_batches = check_limit(
            "limit_train_batches", limit_train_batches
        )
        self.limit_val_batches = check_limit("limit_val_batches", limit_val_batches)
        self.limit_test_batches = check_limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = check_limit(
            "limit_predict_batches", limit_predict_batches
        )
        self.min_epochs, self.min_steps, self.max_steps = (
            min_epochs,
            min_steps,
            max_steps,
        )
        self.max_epochs = max_epochs
        if max_epochs is None:
            self.max_epochs = 1000 if max_steps == -1 and max_time is None else -1
        self.num_sanity_val_steps = (
            2 if num_sanity_val_steps is None else num_sanity_val_steps
        )
        self.log_every_n_steps = (
            50 if log_every_n_steps is None else log_every_n_steps or INFINITE
        )
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.inference_mode = inference_mode
        self.use_distributed_sampler = use_distributed_sampler
        self.detect_anomaly = detect_anomaly
        self.deterministic, self.benchmark = deterministic, benchmark
        self.compile = compile
        self.barebones = barebones
        self.fast_dev_run = int(fast_dev_run)
        self.default_root_dir = os.path.expanduser(
            plain(os.fspath(default_root_dir or os.getcwd()))
        )

        switches = {
            "logger": logger, "enable_checkpointing": enable_checkpointing, "profiler": profiler,
            "enable_progress_bar": enable_progress_bar, "enable_model_summary": enable_model_summary,
        }  # fmt: skip
        if barebones and (asked := [name for name, value in switches.items() if value]):
            raise ValueError(
                f"barebones=True switches {', '.join(asked)} off; do not ask for both"
            )
        quiet = barebones or self.fast_dev_run
        if quiet:
            self.num_sanity_val_steps = 0
        if self.fast_dev_run:
            self._limit_to(self.fast_dev_run)

        self.engine = Engine(
            accelerator,
            devices,
            num_nodes,
            strategy,
            precision,
            sync_batchnorm=sync_batchnorm,
            launch=False,
        )
        self.engine.keep_gradients_local(micro_batch is not None)
        self.state = RunState()
        self.control = Control(self.engine.strategy)
        self.loggers: list[Logger] = self._make_loggers(False if quiet else logger)
        self.callbacks: list[Callback] = self._make_callbacks(
            callbacks,
            checkpointing=enable_checkpointing,
            progress_bar=enable_progress_bar,
            summary=enable_model_summary,
            default=not barebones,
            max_time=max_time,
            profiler=profiler,
        )

        # Set while a run is prepared, by _run.
        self.module: Module = None  # type: ignore[assignment] # None only before the first run
        self.datamodule: DataModule | None = None
        self.data: RunData = None  # type: ignore[assignment] # as above
        self.bus: CallbackBus = None  # type: ignore[assignment] # as above
        self.optimization: Optimization = None  # type: ignore[assignment] # None before the first fit
        self.metrics = Metrics(self.engine.strategy, enabled=not barebones)
        self.fitted = False  # whether there is an optimization
        self.carried: CarriedFit | None = (
            None  # what another process left of the last fit, if it did not run here
        )
        self.ckpt_path: str | None = None
        self.resumed: dict[str, Any] | None = (
            None  # what of a checkpoint is applied when the loop has begun
        )
        self.unfinished: dict[str, Any] | None = (
            None  # the values of an epoch that was left before its end
        )
        self._module_callbacks: tuple[Module | None, list[Callback]] = (None, [])
        self._modes: dict[torch.nn.Module, bool] = {}
        self._signals: Signals | None = None  # while a fit notes them
        self._warned: set[str] = set()  # what warn_once has said in this run
        self._in_eval_mode: set[torch.nn.Module] = (
            set()
        )  # parts of the module, before any hook of the fit

    # -- arguments --------------------------------------------------------------------------------------------

    def _limit_to(self, batches: int) -> None:
        """Run ``batches`` of everything, once."""
        self.limit_train_batches = self.limit_val_batches = batches
        self.limit_test_batches = self.limit_predict_batches = batches
        self.max_epochs, self.max_steps = 1, batches
        self.val_check_interval, self.check_val_every_n_epoch = 1.0, 1

    def _make_loggers(self, logger: Any) -> list[Logger]:
        if logger is None or logger is True:
            return [builtin_loggers.TensorBoardLogger(self.default_root_dir)]
        if logger is False:
            return []
        return check_loggers(logger, "a Logger, a list of them, True or False")

    def _make_callbacks(
        self, callbacks: Any, checkpointing: bool | None, progress_bar: bool | None, summary: bool | None,
        default: bool, max_time: Any, profiler: str | None,
    ) -> list[Callback]:  # fmt: skip
        given = (
            []
            if callbacks is None
            else list(callbacks)
            if isinstance(callbacks, (list, tuple))
            else [callbacks]
        )
        for callback in given:
            check_callback(callback)
        wanted: list[tuple[str, str, bool | None, bool]] = [
            (
                "ModelCheckpoint",
                "enable_checkpointing",
                checkpointing,
                not self.fast_dev_run,
            ),
            (
                "ProgressBar",
                "enable_progress_bar",
                progress_bar,
                not self.engine.is_copy,
            ),
            ("ModelSummary", "enable_model_summary", summary, not self.engine.is_copy),
        ]
        for name, argument, asked, usual in wanted:
            kind = getattr(builtin_callbacks, name)
            present = any(isinstance(callback, kind) for callback in given)
            if present and asked is False:
                raise ValueError(
                    f"{argument}=False, but callbacks holds a {name}; leave one of them out"
                )
            if not present and default and usual and asked is not False:
                made = (
                    builtin_callbacks.RichProgressBar if name == "ProgressBar" else kind
                )
                given.append(made())
        if max_time is not None:
            given.append(builtin_callbacks.MaxTime(max_time))
        if profiler is not None:
            name = {"simple": "SimpleProfiler", "pytorch": "PyTorchProfiler"}[profiler]
            given.append(getattr(builtin_callbacks, name)())
        _check_state_keys(given)
        return order_callbacks(given)

    # -- the four runs ----------------------------------------------------------------------------------------

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train ``model``.

        Called again with the same module, it goes on from where the last call ended (raise ``trainer.max_epochs``
        first): with the optimizers' and schedulers' states, unless ``configure_optimizers`` now returns others, such as
        with another learning rate. Another module begins at the beginning.

        Args:
            model: the module.
            train_dataloaders: a loader, or a list or dict of loaders that are read together; or a ``DataModule``.
            val_dataloaders: a loader or a list of them.
            datamodule: a ``DataModule`` instead of the loaders.
            ckpt_path: resume exactly from this checkpoint: a path, ``"last"`` (the newest complete one; from the
                beginning if there is none yet) or ``"best"``.
            weights_only: False lets the checkpoint's pickled objects be loaded, which can run code.
        """
        given = {"train": train_dataloaders, "validate": val_dataloaders}
        self.execute(
            self._plan("fit", model, datamodule, given, ckpt_path, weights_only)
        )

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Validate once.

        Args:
            model: the module (default: that of the last run, from its best checkpoint if there is one).
            dataloaders: a loader or a list of them; or a ``DataModule``.
            ckpt_path: a checkpoint to load weights from: a path, ``"best"`` or ``"last"``.
            verbose: print the results.
            datamodule: a ``DataModule`` instead of the loaders.
            weights_only: False lets the checkpoint's pickled objects be loaded, which can run code.

        Returns:
            For each loader, the logged values by name.
        """
        return self._evaluate(
            "validate", model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Test once; arguments and result as of :meth:`validate`."""
        return self._evaluate(
            "test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def _evaluate(
        self, stage: str, model: Any, dataloaders: Any, ckpt_path: Any, verbose: bool, datamodule: Any,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:  # fmt: skip
        results = self.execute(
            self._plan(
                stage, model, datamodule, {stage: dataloaders}, ckpt_path, weights_only
            )
        )
        if verbose and self.is_global_zero and not self.engine.is_copy and any(results):
            from .messages import print_results

            print_results(stage, results)
        return results

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | Literal["all"] | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Predict once.

        Args:
            model: the module (default: that of the last run, from its best checkpoint if there is one).
            dataloaders: a loader or a list of them; or a ``DataModule``.
            datamodule: a ``DataModule`` instead of the loaders.
            return_predictions: False keeps nothing and returns None (for writing them in a callback). With several
                processes, True (the default) keeps those of each process in it, and ``"all"`` gives all of them to each
                process, on the CPU, in the order of the loader's batches; in a notebook that is the default.
            ckpt_path: a checkpoint to load weights from: a path, ``"best"`` or ``"last"``.
            weights_only: False lets the checkpoint's pickled objects be loaded, which can run code.

        Returns:
            What ``predict_step`` returned, a list by batch, its tensors on the CPU; with several loaders, a list of
            such lists.
        """
        check_choice(
            "return_predictions", return_predictions, (None, True, False, "all")
        )
        keep = {
            None: "all" if self.engine.must_launch else "own",
            True: "own",
            False: "none",
        }
        given = {"predict": dataloaders}
        plan = self._plan(
            "predict",
            model,
            datamodule,
            given,
            ckpt_path,
            weights_only,
            keep.get(return_predictions, "all"),
        )
        outputs = self.execute(plan)
        if return_predictions is False:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    # -- a run's beginning and end ----------------------------------------------------------------------------

    def _plan(
        self, fn: str, model: Any, datamodule: Any, given: dict[str, Any], ckpt_path: Any, weights_only: bool | None,
        keep: str = "own",
    ) -> Run:  # fmt: skip
        """Check the arguments of a run, before anything is set up or started."""
        if weights_only not in (None, True, False):
            raise ValueError(
                f"weights_only must be True, False or None; got {weights_only!r}"
            )
        if ckpt_path is not None and not isinstance(ckpt_path, (str, os.PathLike)):
            raise TypeError(
                f'ckpt_path must be a path, "best", "last" or None; got {ckpt_path!r}'
            )
        first = next(iter(given))
        if isinstance(given[first], DataModule):
            given[first], datamodule = None, datamodule or given[first]
        if datamodule is not None and any(
            value is not None for value in given.values()
        ):
            raise ValueError(f"{fn} takes loaders or a datamodule, not both")
        if model is None:
            if self.module is None:
                raise ValueError(
                    f"{fn} needs a model: this Trainer has not run one yet"
                )
            model = self.module
            fitted = self.fitted or self.carried is not None
            if (
                ckpt_path is None
                and fitted
                and getattr(self.checkpoint_callback, "best_model_path", "")
            ):
                ckpt_path = "best"
        check_run(self, fn, model, datamodule, given)
        return Run(fn, model, datamodule, given, ckpt_path, weights_only, keep)

    def execute(self, run: Run) -> Any:
        """Run: here, or in processes that are started for it."""
        if self.is_running:
            raise RuntimeError(
                f"{run.fn} was called while this Trainer is running {self.state.fn}, as in a hook or a step: use "
                f"another Trainer there, such as Trainer(logger=False, enable_checkpointing=False).{run.fn}(module, …)"
            )
        if self.engine.must_launch:
            return run_in_processes(self, run)
        changes_weights = run.fn == "fit" or run.ckpt_path is not None
        with attached(self, run.model, run.datamodule, changes_weights), self._run(run):
            if run.fn == "fit":
                return fit(self)
            limits = {
                "validate": self.limit_val_batches,
                "test": self.limit_test_batches,
            }
            if not self.data.load(
                run.fn, limit := limits.get(run.fn, self.limit_predict_batches)
            ):
                if limit:
                    self._note_no_data(run.fn)
                return []
            loaders, batches = self.data.loaders[run.fn], self.data.max_batches[run.fn]
            if run.fn != "predict":
                return evaluate(self, run.fn, loaders, batches)
            outputs = predict(self, loaders, batches, run.keep != "none")
            return (
                self.data.in_order("predict", outputs)
                if run.keep == "all" and self.world_size > 1
                else outputs
            )

    def _note_no_data(self, fn: str) -> None:
        name = {"validate": "val"}.get(fn, fn)
        if fn != "predict":
            raise ValueError(
                f"{name}_dataloader returned no loader: there is nothing to {fn} on"
            )
        self.warn_once(
            "predict_dataloader returned no loader: there is nothing to predict"
        )

    @contextmanager
    def _run(self, run: Run) -> Iterator[None]:
        """Prepare a run, hand over to its loop, and end it: normally, or with an exception's hooks."""
        fn, model, datamodule, ckpt_path = (
            run.fn,
            run.model,
            run.datamodule,
            run.ckpt_path,
        )
        self.state.fn, self.state.stage = fn, None if fn == "fit" else fn
        self.control.begin()
        self._warned.clear()
        clear_failure()
        self.ckpt_path = None
        fitted = (
            self.optimization.module
            if self.fitted
            else self.carried and self.carried.module
        )
        if fn == "fit" and fitted not in (None, model):
            # Another module begins at the beginning.
            self.state, self.fitted, self.unfinished = RunState(fn=fn), False, None
            self.carried = None
        if fn == "fit" and self.unfinished is not None and ckpt_path is None:
            self.resumed = {
                **self.unfinished,
                "rng": None,
            }  # go on inside the epoch in which the last fit stopped
        self.module, self.datamodule = model, datamodule
        self.data = RunData(self, model, datamodule, run.given)
        self.metrics.module = model
        if fn != "fit":
            self.metrics.results.progress_bar.clear()  # what a fit before showed is not of this run
        self.callbacks = self.with_module_callbacks(model)
        self.bus = CallbackBus(self, model, self.callbacks)
        self.state.status = "running"
        try:
            with ExitStack() as contexts:
                if self.detect_anomaly:
                    contexts.enter_context(torch.autograd.set_detect_anomaly(True))
                if fn == "fit":  # in a hook of an evaluation, too
                    contexts.enter_context(torch.inference_mode(False))
                    contexts.enter_context(torch.enable_grad())
                contexts.enter_context(own_metrics(model, self.world_size))
                self._prepare(fn, ckpt_path, run.weights_only)
                yield
            if fn == "fit":
                for hook in self.bus.on_fit_end:
                    hook()
            self._teardown(fn)
            self.state.status, self.state.stage = "finished", None
            for logger in self.loggers:
                logger.finalize("success")
        except BaseException as error:
            if not self.control.signal:  # such an end needs no explanation
                record_failure(
                    error, self.state.where
                )  # while signals are only noted: one may end this process at once
            self._end_signals()
            self._fail(error)
            raise
        finally:
            own = self._end_signals()
            release_folders(self)
            self._signals = None
            self.data.close()
            self.state.stage = None
            self.metrics.enter(None, None)
        if own is not None:
            own.send_again()  # what came too late for the loop

    def _end_signals(self) -> Signals | None:
        if self._signals is not None:
            self._signals.end()
        return self._signals

    def _prepare(self, fn: str, ckpt_path: Any, weights_only: bool | None) -> None:
        module, datamodule = self.module, self.datamodule
        _set_torch_flags(self.deterministic, self.benchmark)
        self.engine.connect()
        self.engine.all_call(fn)  # a collective
        checkpoint = (
            None if ckpt_path is None else read_run(self, ckpt_path, weights_only)
        )
        if checkpoint is not None and fn == "fit":
            restore_start(
                self, checkpoint
            )  # before anybody asks for a folder, or for the order of the data
        if fn == "fit" and self.is_global_zero:  # the others are told
            for logger in self.loggers:
                logger.claim()
        if self.world_size > 1:
            self._share_places()
        for owner, base in ((datamodule, DataModule), (module, Module)):
            if owner is not None and overrides(owner, "prepare_data", base):
                if self.local_rank == 0:
                    owner.prepare_data()
                self.strategy.barrier()
        if datamodule is not None:
            datamodule.setup(fn)
        for hook in self.bus.setup:
            hook(fn)
        with (
            self.engine.precision.init_context(),
            self.strategy.init_context(self.engine.precision),
        ):
            module.configure_model()
        module.trainer = self  # of what was made just now, too
        if self.compile:
            compile_submodules(
                module, self.compile if isinstance(self.compile, dict) else {}
            )
        goes_on = fn == "fit" and checkpoint is None
        if self.fitted and (goes_on or self.optimization.module is not module):
            # Before the strategy takes a module up, and with whole tensors, as they may be spread otherwise then.
            fit = self.optimization
            state = full_state(self.strategy, fit.state_dict())
            self.carried, self.fitted = (
                CarriedFit(fit.module, fit.configured, state),
                False,
            )
        self.engine.setup(module)
        if checkpoint is not None:
            restore_module(self, checkpoint)
        if fn != "fit":
            return
        optimizers, schedulers = parse_optimizers(self._configure_optimizers())
        check_schedulers(optimizers, schedulers)
        self._check_optimizers(optimizers, schedulers)
        made = [*optimizers, *(config.scheduler for config in schedulers)]
        kinds = [
            type(item).__name__ for item in made
        ]  # as the user knows them: a strategy may give others
        optimizers = self.engine.setup_optimizers(optimizers)
        self.optimization = Optimization(
            self, self.engine, module, optimizers, schedulers, kinds
        )
        self.fitted = True
        self._announce()
        self._log_hyperparameters()
        self._in_eval_mode = {part for part in module.modules() if not part.training}
        for hook in self.bus.on_fit_start:
            hook()
        # Only now, so that a callback which has added parameter groups can add them again in on_fit_start.
        if checkpoint is not None:
            restore_run(self, checkpoint)
        elif (
            self.carried is not None
            and self.carried.configured == self.optimization.configured
        ):
            self.optimization.load_state_dict(self.carried.state_dict())
        self.carried = None
        self.unfinished = None

    def _share_places(self) -> None:
        """Let all processes draw the data's order from one seed, and know the folders of the main process's loggers."""
        if self.state.seed is None:
            self.state.seed = self.strategy.broadcast(self.data_seed())
        own = (
            self.loggers if self.is_global_zero else []
        )  # to ask another process's may begin a run there
        places = self.strategy.broadcast(
            [builtin_loggers.place_of(logger) for logger in own]
        )
        if not self.is_global_zero:
            self.loggers = [builtin_loggers.SilentLogger(place) for place in places]

    def _check_optimizers(
        self, optimizers: list[Any], schedulers: list[LRSchedulerConfig]
    ) -> None:
        if not self.module.automatic_optimization:
            return  # the module steps them itself
        for config in schedulers:
            config.require_monitor()
        if not optimizers:
            raise ValueError(
                "configure_optimizers returned no optimizer, so there is nothing to train with; return one, or set "
                "self.automatic_optimization = False in __init__ and do the steps in training_step"
            )
        if len(optimizers) > 1:
            raise ValueError(
                f"configure_optimizers returned {len(optimizers)} optimizers; automatic optimization steps one. Set "
                "self.automatic_optimization = False in __init__ and call opt.update(loss) for each in training_step"
            )
        self._check_optimizer(optimizers[0])

    def _check_optimizer(self, optimizer: Any) -> None:
        """Refuse one that automatic optimization cannot step; say so if it steps nothing of the module."""
        # That of the class: a scheduler puts a function of its own in the place of the object's.
        parameters = list(inspect.signature(type(optimizer).step).parameters.values())[
            1:
        ]
        required = [
            p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL
        ]
        if required and not overrides(self.module, "optimizer_step", Module):
            raise ValueError(needs_closure(type(optimizer).__name__))
        own = set(self.module.parameters())
        if not any(
            parameter in own
            for group in optimizer.param_groups
            for parameter in group["params"]
        ):
            log.warning(
                "configure_optimizers returned an optimizer of none of %s's parameters: nothing of it is trained",
                type(self.module).__name__,
            )

    def _configure_optimizers(self) -> Any:
        """What the module's hook returns.

        Raises:
            ValueError: if it has no parameters to give to an optimizer.
        """
        try:
            return self.module.configure_optimizers()
        except ValueError as error:
            if next(self.module.parameters(), None) is not None:
                raise
            raise ValueError(
                f"configure_optimizers: {type(self.module).__name__} has no parameters. Layers must be attributes of "
                "it; several of them in an nn.ModuleList or nn.ModuleDict, not in a plain list or dict"
            ) from error

    def with_module_callbacks(self, module: Module) -> list[Callback]:
        """The Trainer's callbacks and the module's; a module that runs again keeps those of its first run."""
        returned = module.configure_callbacks()
        own = list(returned) if isinstance(returned, (list, tuple)) else [returned]
        for callback in own:
            check_callback(callback)
        before, earlier = self._module_callbacks
        if before is module:
            return order_callbacks(self.callbacks)
        configured = [
            callback for callback in self.callbacks if callback not in earlier
        ]
        self._module_callbacks = (module, own)
        kinds = {type(callback) for callback in own}
        merged = [
            callback for callback in configured if type(callback) not in kinds
        ] + own
        _check_state_keys(merged)
        return order_callbacks(merged)

    def _announce(self) -> None:
        """Say once what is in force."""
        if self.barebones or not self.is_global_zero:
            return
        log.info(
            "Training on %s (strategy %s, %d process%s%s) in %s%s", self.engine.device, self.strategy.name,
            self.world_size, "" if self.world_size == 1 else "es",
            f" launched by {self.engine.environment.launcher}" if self.engine.environment is not None else "",
            self.engine.precision.name,
            f", {self.accumulate_grad_batches} batches per step" if self.accumulate_grad_batches > 1 else "",
        )  # fmt: skip

    def announce_batches(self) -> None:
        """Say how much data a step takes, where that is more than a batch."""
        batch_size = getattr(self.train_dataloader, "batch_size", None)
        known = batch_size if isinstance(batch_size, int) else None
        clipping = self.gradient_clip_val, self.gradient_clip_algorithm
        self.strategy.check_steps(known, self.accumulate_grad_batches, *clipping)
        if self.barebones or not self.is_global_zero or not isinstance(batch_size, int):
            return
        parts = data_place(self.strategy)[1]
        factors = ((parts, "processes"), (self.accumulate_grad_batches, "batches"))
        if several := [f" × {count} {what}" for count, what in factors if count > 1]:
            total = batch_size * parts * self.accumulate_grad_batches
            log.info(
                "Effective batch size: %d samples%s = %d",
                batch_size,
                "".join(several),
                total,
            )

    def announce_surprises(self) -> None:
        """Say what a user may not have meant: parts in evaluation mode, loggers that get no row in an epoch."""
        if names := names_in_eval_mode(self.module, self._in_eval_mode):
            self.warn_once(
                "In evaluation mode when training begins, so without dropout and with fixed batch norms: %s. If that "
                "is not meant, call train() on it, such as in on_fit_start", ", ".join(names),
            )  # fmt: skip
        self._in_eval_mode = set()
        every, epochs = self.check_val_every_n_epoch, self.max_epochs
        if (
            every
            and epochs not in (None, -1)
            and every > epochs
            and self.num_val_batches
        ):
            self.warn_once(
                "Nothing is validated: check_val_every_n_epoch=%d, and max_epochs=%d",
                every,
                epochs,
            )
        steps = self.num_training_batches / self.accumulate_grad_batches
        if self.loggers and steps <= self.log_every_n_steps - 1 < INFINITE:
            log.info(
                "An epoch has %d optimizer steps, fewer than log_every_n_steps=%d: not each epoch writes step values",
                math.ceil(steps), self.log_every_n_steps,
            )  # fmt: skip

    def announce_end(self) -> None:
        """Say why a fit has nothing to train."""
        epochs, steps = self.max_epochs, self.max_steps
        by_epochs = epochs not in (None, -1) and self.state.epoch >= epochs
        limit = f"max_epochs={epochs}" if by_epochs else f"max_steps={steps}"
        name = limit.partition("=")[0]
        self.warn_once(
            "There is nothing to train: %s was reached before (epoch %d, step %d). To go on, set trainer.%s to more",
            limit, self.state.epoch, self.state.global_step, name,
        )  # fmt: skip

    def _log_hyperparameters(self) -> None:
        owners = [
            owner
            for owner in (self.module, self.datamodule)
            if owner is not None and owner._log_hyperparams
        ]
        merged: dict[str, Any] = {}
        for owner in owners:
            merged.update(portable(owner.hparams_initial))
        for logger in self.loggers if self.is_global_zero else ():
            if merged:
                logger.log_hyperparams(merged)
            if (
                not self.strategy.equal_forwards or self.world_size == 1
            ):  # else its forward takes all processes
                logger.log_graph(self.module)

    def _teardown(self, fn: str) -> None:
        if self.datamodule is not None:
            self.datamodule.teardown(fn)
        for hook in self.bus.teardown:
            hook(fn)
        self.engine.saver.wait()
        self.strategy.teardown()
        # What follows finds the last checkpoint complete. Also, gloo's threads must not hold the last tensors of a run
        # when the interpreter ends: that aborts the process.
        self.strategy.barrier()

    def _fail(self, error: BaseException) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        self.state.status = (
            "interrupted" if interrupted or self.control.signal else "failed"
        )
        self.strategy.failed = True  # no collective in hooks: the other processes may be in another one, or gone
        if self.must_end_at_once:
            self.engine.saver.abandon()
        try:
            for hook in self.bus.on_exception:
                hook(error)
            if self.datamodule is not None:
                self.datamodule.on_exception(error)
        except Exception:
            log.exception(
                "A hook on_exception raised in turn; what ended the run follows"
            )
        self.restore_training_mode()  # of an evaluation that did not come to its end
        self.engine.saver.wait()
        self.strategy.teardown()
        self.strategy.failed = False
        for logger in self.loggers:
            logger.finalize(self.state.status)

    # -- checkpoints ------------------------------------------------------------------------------------------

    def note_signals(self) -> None:
        """From now until the fit's end, signals that ask to end are only noted, for the loop."""
        self._signals = Signals(self.control, self.state, self.is_global_zero)
        self._signals.begin()

    @property
    def must_end_at_once(self) -> bool:
        """Whether the user has pressed Ctrl-C a second time."""
        return self._signals is not None and self._signals.in_a_hurry

    def end_by_signal(self) -> NoReturn:
        """Save a checkpoint, and end as the signal asks that all processes have agreed on.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for others, with the exit code of a process that the signal ended: 128 + its number.
        """
        number = signal.Signals(self.control.signal)
        callback = self.checkpoint_callback
        path = "" if callback is None else callback.save_now(self)
        self.control.saved_for_signal = bool(path)
        if self.is_global_zero:
            why = (
                "there is no ModelCheckpoint"
                if callback is None
                else f"nothing of step {self.global_step} could be"
            )
            saved = f"saved {path}" if path else f"{why}, nothing is saved"
            log.warning(
                "%s at step %d: %s; ending", number.name, self.global_step, saved
            )
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = False,
        storage_options: Any = None,
    ) -> None:
        """Write a checkpoint; when this returns, it is complete and on disk. All processes call this.

        If the main process alone does, and has all of the state, the checkpoint lacks what the others have drawn and
        logged in the running epoch. Inside an accumulation window the data cursor is put at the window's start: its
        batches are read again.

        Args:
            filepath: the directory to make, local or any fsspec URL.
            weights_only: leave out all that only resuming needs.
            storage_options: accepted for familiarity; must be None (fsspec is configured by its own means).

        Raises:
            RuntimeError: before the first run; or if some processes call something else, where each has a part of the
                state.
            OSError: if it cannot be written; what was at ``filepath`` before is untouched.
        """
        if storage_options is not None:
            raise ValueError(f"storage_options must be None; got {storage_options!r}")
        if self.module is None:
            raise RuntimeError(
                "save_checkpoint: this Trainer has run nothing yet; call fit first"
            )
        together = self.engine.all_call("save_checkpoint", alone=can_save_alone(self))
        save_run(
            self, os.fspath(filepath), bool(weights_only), together=together
        ).finish()

    def begin_save(
        self,
        filepath: str,
        weights_only: bool = False,
        wait: bool = False,
        on_complete: Callable[[], None] | None = None,
    ) -> Save:
        """Write a checkpoint while the training goes on; this waits for the one before, and copies the tensors.

        Args:
            filepath: the directory to make, local or any fsspec URL.
            weights_only: leave out all that only resuming needs.
            wait: until it is complete, without a copy.
            on_complete: called in the main process when it is complete, in the thread that writes.

        Returns:
            What tells how it went: its ``finish()`` waits, and raises what writing raised; all processes call it.
            Its ``written`` then says whether the checkpoint is complete, whatever ``on_complete`` raised.
        """
        return save_run(self, filepath, weights_only, wait, on_complete)

    def export(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write the module's weights, and nothing else, to one safetensors file.

        All processes call this, or the main one alone where it has all of the weights.

        Args:
            path: the file, local or any fsspec URL; one that is there is replaced, all at once.
            dtype: to convert floating-point weights to, such as ``torch.bfloat16``.

        Raises:
            RuntimeError: before the first run.
            ValueError: if ``path`` is a folder.
            OSError: if it cannot be written.
        """
        if self.module is None:
            raise RuntimeError(
                "export: this Trainer has run nothing yet; call fit first"
            )
        together = self.engine.all_call(
            "export", alone=self.is_global_zero and not self.strategy.shards_state
        )
        file, state = (
            os.fspath(path),
            full_state(self.strategy, self.strategy.model_state()),
        )
        in_main_process(
            self.strategy, file, lambda: export_weights(state, file, dtype), together
        )

    def agree_on_save(
        self, path: str, failed: BaseException | None
    ) -> BaseException | None:
        """Tell all processes what went wrong in this one while ``path`` was saved, if anything. All call this.

        Returns:
            ``failed``, or an error of the same sort that tells of another process's, or None.
        """
        return exchange(self.strategy, path, failed)[1]

    def checkpoint_exists(self, path: str) -> bool:
        """Whether a checkpoint, or anything else that must not be overwritten, is at ``path``."""
        self.engine.saver.wait()  # it may be the one that is being written
        return is_taken(path)

    def remove_checkpoint(self, path: str, root: str | None = None) -> None:
        """Delete a checkpoint, or a pointer to one; files beside those of the checkpoint stay.

        Args:
            path: the checkpoint.
            root: the folders between this one and the checkpoint go, too, where that leaves them empty.

        Raises:
            CheckpointError: if a directory is there that is no checkpoint.
        """
        remove_checkpoint(path, root)

    def claim_folder(self, path: str) -> str:
        """Make a folder to save in that no other run has until this one ends. A collective.

        Returns:
            ``path``, or a folder inside of it if another run has that.

        Raises:
            OSError: if nothing can be written there; in all processes.
        """
        claimed, failed = path, None
        try:
            claimed = claim_folder(path, self) if self.is_global_zero else path
        except Exception as error:
            failed = OSError(
                f"the folder for checkpoints {path!r} cannot be written to: {error}"
            )
        values, failed = exchange(self.strategy, path, failed, claimed)
        if failed is not None:
            raise failed
        return values[0]

    def write_pointer(self, path: str, target: str) -> None:
        """Make the small file ``path`` name the checkpoint ``target``, all at once."""
        write_pointer(path, target)

    def progress(self) -> dict[str, Any]:
        """The run's counters as a checkpoint keeps them: at the start of an open accumulation window."""
        counters = self.state.state_dict()
        if self.window_is_open:
            behind = self.state.batch_idx - self.optimization.window.start
            counters["batch_idx"] -= behind
            counters["validated"] = min(counters["validated"], counters["batch_idx"])
        return counters

    def gathered(self) -> dict[str, Any]:
        """What the running epoch has gathered: the values to be reduced at its end, and the loader's own state."""
        if self.unfinished:
            return self.unfinished
        batch_idx = self.progress()["batch_idx"]
        return {
            "metrics": self.metrics.state_dict(),
            "metric_states": metric_states(self.module),
            "loader": self.data.loader_state(batch_idx),
            "cursor": self.data.cursor(batch_idx),
            "saved_by": self.world_size,
        }

    # -- logging ----------------------------------------------------------------------------------------------

    def log_row(self, values: dict[str, Any]) -> None:
        """Write one row to the loggers, with the epoch in it and the global step as its step."""
        if not values or not self.loggers or not self.is_global_zero:
            return
        row = {"epoch": self.state.epoch, **as_floats(values)}
        for logger in self.loggers:
            logger.log_metrics(row, step=self.state.global_step)

    def log_step(self) -> None:
        """Write the running step's values to the loggers."""
        if self.loggers:
            self.log_row(self.metrics.step_results().logged)

    def warn_once(self, message: str, *args: Any) -> None:
        """Say in the main process what a user may not have meant; once in a run."""
        if message not in self._warned and self.is_global_zero:
            log.warning(message, *args)
        self._warned.add(message)

    # -- data -------------------------------------------------------------------------------------------------

    def data_seed(self) -> int:
        """The seed from which this run's data order is drawn: that of torch's generator when it was first asked."""
        if self.state.seed is None:
            self.state.seed = torch.initial_seed() % 2**63
        return self.state.seed

    def load_val_data(self) -> bool:
        """Make the validation loaders if validation runs in this epoch; False if there is nothing to validate on."""
        if not self.enable_validation:
            return False
        again = self.data.stale("validate", self.reload_dataloaders_every_n_epochs)
        return self.data.load("validate", self.limit_val_batches, again)

    def validation_due_in_epoch(self) -> bool:
        """Whether the running epoch is one with validation."""
        every = self.check_val_every_n_epoch
        return self.enable_validation and (
            every is None or (self.state.epoch + 1) % every == 0
        )

    def validation_interval(self) -> tuple[int | float, int]:
        """Validate after batches ``i`` of the epoch (from 1) with ``(i + offset) % every == 0``; never if infinite."""
        if not self.enable_validation:
            return INFINITE, 0
        interval = self.val_check_interval
        if self.check_val_every_n_epoch is None and isinstance(interval, int):
            return interval, self.state.past_batches
        if isinstance(interval, int):
            whole = (
                self.data.whole_epoch
            )  # one that was taken up may be shorter: it has no validation then
            if interval > whole:
                raise ValueError(
                    f"val_check_interval={interval} is more than the {whole} training batches of an epoch; for an "
                    "interval over epochs, set check_val_every_n_epoch=None"
                )
            return interval, 0
        batches = self.data.max_batches["train"]
        if batches == INFINITE:
            if interval == 1.0:
                return INFINITE, 0
            batches = self.num_training_batches
        if batches == INFINITE:
            raise ValueError(
                f"val_check_interval={interval}: the training loader has no length to take a fraction of; pass a "
                "number of batches"
            )
        return max(1, int(batches * interval)), 0

    def validation_due_at_end(self) -> bool:
        """Whether to validate at an epoch's end, where that was not known beforehand.

        The last of the validations that come after each fraction of an estimated epoch is the one at its end, unless
        there has just been one.
        """
        batches = self.state.batch_idx
        if (
            not isinstance(self.val_check_interval, float)
            or batches >= self.data.max_batches["train"]
        ):
            return False
        every, _ = self.validation_interval()
        return self.state.validated < 0 or batches % every * 2 > every

    def validation_follows(self) -> bool:
        """Whether validation comes right after the training batch that has just ended."""
        every, offset = self.validation_interval()
        due = (self.state.batch_idx + offset) % every == 0
        at_end = self.state.batches_done and self.validation_due_at_end()
        return (due or at_end) and self.validation_due_in_epoch()

    @property
    def enable_validation(self) -> bool:
        """Whether ``fit`` validates: there is a loader, a ``validation_step`` and a limit above 0."""
        return (
            bool(self.limit_val_batches)
            and overrides(self.module, "validation_step", Module)
            and self.data.has("validate")
        )

    # -- the module's training mode, and a hook about gradients -----------------------------------------------

    def remember_training_mode(self) -> None:
        """Note for each submodule whether it is in training mode."""
        self._modes = {module: module.training for module in self.module.modules()}

    def restore_training_mode(self) -> None:
        """Put each submodule back into the mode that was noted."""
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def zero_grad_hook(self) -> tuple[Any, ...]:
        """The module's ``on_validation_model_zero_grad``, if it overrides it."""
        overridden = overrides(self.module, "on_validation_model_zero_grad", Module)
        return (self.module.on_validation_model_zero_grad,) if overridden else ()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the main process only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The bus, the data and the optimization hold functions bound to one run; a copy gets its own when it runs, and
        # goes on with the states of optimizers and schedulers.
        state = self.state
        if self.is_running:
            state = replace(state, fn=None, stage=None, status="initializing")
        carried, fit = self.carried, self.optimization
        if self.fitted:
            carried = CarriedFit(fit.module, fit.configured, fit.state_dict())
        own = {
            "bus": None,
            "data": None,
            "optimization": None,
            "fitted": False,
            "carried": carried,
            "state": state,
        }
        return {**self.__dict__, **own, "_signals": None}


def _set_torch_flags(deterministic: bool | str | None, benchmark: bool | None) -> None:
    if deterministic is not None:
        torch.use_deterministic_algorithms(
            bool(deterministic), warn_only=deterministic == "warn"
        )
        if deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # without it cuBLAS refuses
    if benchmark is not None:
        if benchmark and deterministic:
            warnings.warn(
                "benchmark=True may choose algorithms that are not deterministic",
                stacklevel=2,
            )
        torch.backends.cudnn.benchmark = benchmark


def _check_state_keys(callbacks: list[Callback]) -> None:
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if not overrides(callback, "state_dict", Callback):
            continue
        if (other := seen.get(callback.state_key)) is not None:
            raise ValueError(
                f"two callbacks keep their states under the same key {callback.state_key!r}: {type(other).__name__} "
                f"and {type(callback).__name__}; give them different arguments, or override state_key"
            )
        seen[callback.state_key] = callback
