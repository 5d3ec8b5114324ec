"""The Trainer: what a user sees of a run, from its arguments to its results."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from .. import callbacks as builtin_callbacks
from .. import loggers as builtin_loggers
from ..callbacks.base import Callback
from ..callbacks.intervals import Interval, read_interval
from ..loggers.base import Logger
from ..loggers.dummy import DummyLogger
from ..loggers.media import as_media
from ..strategies.tensor_shards import full_state
from .arguments import (
    check_choice,
    check_clipping,
    check_count,
    check_limit,
    check_max_time,
    check_validation,
    names_arguments,
)
from .checkpoint.schema import RunState
from .checkpoint.stages import TrainerStatus
from .checkpoint.storage import without_local_scheme
from .checkpoint.weights import export_weights
from .data.batches import batch_size_of
from .data.iteration import INFINITE
from .datamodule import DataModule
from .engine.accelerate_launch import launched_accumulation
from .engine.compile import read_compilation, uncompiled
from .engine.engine import Engine
from .errors import on_main_rank
from .lifecycle.callbacks import (
    default_callbacks,
    make_profiler,
    with_module_callbacks,
)
from .lifecycle.checks import check_new_optimizers, check_run
from .lifecycle.execute import begin_step, execute
from .lifecycle.rehearsal import rehearse
from .lifecycle.rewind import rewind
from .lifecycle.run_checkpoints import RunCheckpoints
from .lifecycle.save import can_save_alone, save_run
from .loop import weight_sets
from .loop.automatic import AutomaticStep
from .loop.consensus import Consensus
from .loop.forward_pass import forward_training_batches
from .loop.hooks import order_callbacks
from .loop.optimizers import LRSchedulerConfig, ManualOptimizer
from .loop.record import NoRecord
from .loop.run import FitState, Run, RunRequest
from .messages import configure
from .metrics.metrics import Metrics
from .metrics.values import as_floats, as_tensors
from .module import Module
from .report.asked import Asked, asked
from .seed import isolated_rng
from .subclasses import check_loggers, overrides

if TYPE_CHECKING:
    from ..callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
    from ..strategies import Precision, Strategy
    from .loop.step import Step
    from .report.plan import Plan


class Trainer:
    """Runs a :class:`~loopwright.framework.Module` on data.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or ``"xpu"``.
        strategy: a name, or a :class:`~loopwright.strategies.Strategy`.
        devices: a count, a list of indices, ``"auto"`` or -1 (all). With several, there is a process for each.
        num_nodes: number of machines, or ``"auto"``: as many as a launcher says, else 1.
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``, ``"64-true"``, or a
            :class:`~loopwright.strategies.Precision`. Default: ``"32-true"``, or what ``accelerate launch`` says.
        logger: a logger; its name (``"tensorboard"``, ``"csv"``, ``"jsonl"``, ``"wandb"``, ``"mlflow"``, ``"comet"``,
            ``"trackio"``) for one under ``default_root_dir``; a list of these; True (``"tensorboard"``) or False.
        callbacks: a callback or a list of them.
        fast_dev_run: True or a number: run that many batches of everything, once, without checkpoints and with a logger
            that does nothing.
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
        val_check_interval: validate every so many training batches (int), after this fraction of an epoch (float), or
            when so much time has passed since the last validation: ``"DD:HH:MM:SS"``, ``"00:10:00"``, a ``timedelta``
            or a dict of its arguments.
        check_val_every_n_epoch: validate in every n-th epoch only; None counts ``val_check_interval`` over epochs.
        validate_every: instead of these two, one interval: ``"500 steps"``, ``"2 epochs"``, ``"0.25 epochs"``,
            ``"10 minutes"``, ``"100 batches"`` or ``"1M tokens"``. Tokens are the weights that ``training_step``
            returns (``{"loss": loss, "weight": tokens}``), of all processes.
        validate_before_training: validate once before the first step, instead of the sanity check.
        num_sanity_val_steps: validation batches to run before training; -1 for all.
        log_every_n_steps: write step values to the loggers every so many optimizer steps.
        log_every: the same as text: ``"50 steps"``.
        enable_checkpointing: save checkpoints (a default ``ModelCheckpoint`` if none is given). Default: True.
        enable_progress_bar: show a progress bar. Default: True.
        enable_model_summary: print a table of the model before training. Default: True.
        enable_record: keep a record of each fit in its log folder, in ``record/``: what ran, where and how, the logged
            values, what monitors measure, and how it ended. There is none without a logger.
        accumulate_grad_batches: micro-batches per optimizer step; the last window of an epoch holds what is left.
        micro_batch: run each batch in parts of at most so many samples, one after the other, with the gradient of the
            whole batch; ``"auto"`` begins with all of it and halves the part whenever memory runs out, in all processes
            together. For automatic optimization, under the strategies "single" and "ddp".
        gradient_clip_val: clip gradients to this.
        gradient_clip_algorithm: ``"norm"`` (default) or ``"value"``.
        deterministic: use deterministic algorithms; ``"warn"`` warns where there is none.
        benchmark: let cuDNN try out algorithms. Default: torch's own setting.
        inference_mode: evaluate under ``torch.inference_mode`` rather than ``torch.no_grad`` (outside of ``fit``).
        use_distributed_sampler: True shards the batches of each loader over the processes; False leaves them as they
            are, as each process makes a loader for its own part of the data. By default the processes find out, for
            each loader, which of the two it is.
        profiler: ``"simple"``, ``"advanced"``, ``"pytorch"``, or a callback that measures, such as
            ``SimpleProfiler(dirpath=…)``. It is also what ``trainer.profiler`` is.
        detect_anomaly: raise at the first loss that is not finite, and let autograd name the operation.
        barebones: switch off all that is not the loop: logger, checkpoints, bar, summary, sanity check, ``log``.
        sync_batchnorm: let batch norms compute their statistics over all processes.
        reload_dataloaders_every_n_epochs: make the loaders again every so many epochs; 0 for never.
        reload_dataloaders_every: the same as text: ``"2 epochs"``.
        default_root_dir: where logs and checkpoints go. Default: the working directory.
        auto_requeue: under SLURM, a fit that gets SIGUSR1, or whose time is nearly up, saves and puts its job back into
            the queue. A fit of a job that was started again, by whomever, goes on from its newest checkpoint.
        compile: True or ``"parts"``: compile the module's parts in place, equal blocks once. ``"step"``: make one graph
            of a training step: forward, backward and the optimizer's step; where that cannot be, the parts, and why is
            said. A dict gives arguments of ``torch.compile``, with ``"parts"`` or ``"step"`` under ``"scope"``.
        hang_timeout: how long a process may stand still before it is reported with its stacks and ended, with a code
            that is not 0: seconds or a ``timedelta`` for all phases, 0 for ever, or a mapping of these by phase:
            ``"setup"`` (with the first batch), ``"prepare_data"``, ``"train"``, ``"validate"`` (and other
            evaluations), ``"checkpoint"``, ``"teardown"``. Default: 5 minutes in training, 30 in the other phases, and
            more where steps take long.
        fingerprint: every so many optimizer steps, keep 64 bits in the run's record that tell whether loss, gradients
            and parameters are those of another run, to the last bit. Under "ddp" the processes compare their
            parameters, and the run ends with an error if one has departed from the others.

    Raises:
        ValueError, TypeError: for arguments that are not as described.
    """

    # What a checkpoint is, unless `save_checkpoint` or a ModelCheckpoint says. Subclasses may have another default.
    save_format: Literal["folder", "file"] = "folder"
    # What a module's `optimizers()` gives. Subclasses may have another class.
    manual_optimizer = ManualOptimizer

    @names_arguments
    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: Strategy | str = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int | str = "auto",
        precision: int | Precision | str | None = None,
        logger: bool | Logger | str | Sequence[Logger | str] | None = None,
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
        val_check_interval: int
        | float
        | str
        | timedelta
        | dict[str, int]
        | None = None,
        check_val_every_n_epoch: int | None = 1,
        validate_every: str | None = None,
        validate_before_training: bool = False,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        log_every: str | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        enable_record: bool = True,
        accumulate_grad_batches: int = 1,
        micro_batch: int | str | None = None,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool | None = None,
        profiler: Callback | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        reload_dataloaders_every: str | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        auto_requeue: bool = True,
        compile: bool | str | dict[str, Any] = False,
        hang_timeout: float | timedelta | Mapping[str, float | timedelta] | None = None,
        fingerprint: int | None = None,
    ) -> None:
        configure()
        check_count("max_epochs", max_epochs, -1, (None,))
        check_count("max_steps", max_steps, -1)
        check_count("min_epochs", min_epochs, 0, (None,))
        check_count("min_steps", min_steps, 0, (None,))
        check_count("fast_dev_run", fast_dev_run, 0, (True, False))
        check_count("num_sanity_val_steps", num_sanity_val_steps, -1, (None,))
        check_count("log_every_n_steps", log_every_n_steps, 0, (None,))
        check_count("accumulate_grad_batches", accumulate_grad_batches, 1)
        check_count("micro_batch", micro_batch, 1, (None, "auto"))
        check_count("fingerprint", fingerprint, 1, (None,))
        self.fingerprint = fingerprint
        self.micro_batch = micro_batch
        check_count(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, 0
        )
        check_max_time(max_time)
        check_choice("deterministic", deterministic, (None, True, False, "warn"))
        self.profiler = make_profiler(profiler)
        self.max_time = max_time
        self._accumulate_grad_batches = launched_accumulation(
            "accumulate_grad_batches", accumulate_grad_batches
        )
        self.gradient_clip_algorithm = check_clipping(
            gradient_clip_val, gradient_clip_algorithm
        )
        self.gradient_clip_val = gradient_clip_val
        validation = check_validation(
            val_check_interval, check_val_every_n_epoch, validate_every
        )
        self.val_check_interval, self.check_val_every_n_epoch = validation[:2]
        self.validation_interval: Interval | None = validation[2]
        self.validate_before_training = validate_before_training
        self.overfit_batches = check_limit("overfit_batches", overfit_batches)
        if self.overfit_batches:
            if limit_train_batches is not None:
                raise ValueError(
                    "overfit_batches and limit_train_batches set the same; pass one of them"
                )
            limit_train_batches = self.overfit_batches
            if limit_val_batches is None:
                limit_val_batches = self.overfit_batches
        self.limit_train_batches = check_limit(
            "limit_train_batches", limit_train_batches
        )
        self.limit_val_batches = check_limit("limit_val_batches", limit_val_batches)
        self.limit_test_batches = check_limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = check_limit(
            "limit_predict_batches", limit_predict_batches
        )
        self.min_epochs = min_epochs
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.max_epochs = max_epochs
        if max_epochs is None:
            self.max_epochs = 1000 if max_steps == -1 and max_time is None else -1
        if num_sanity_val_steps is None:
            num_sanity_val_steps = 0 if validate_before_training else 2
        self.num_sanity_val_steps = num_sanity_val_steps
        if log_every is not None:
            _refuse_both("log_every", "log_every_n_steps", log_every_n_steps, None)
            interval = read_interval("log_every", log_every, "steps")
            log_every_n_steps = interval.count("steps")
        if log_every_n_steps is None:
            log_every_n_steps = 50
        self.log_every_n_steps = log_every_n_steps or INFINITE
        if reload_dataloaders_every is not None:
            _refuse_both(
                "reload_dataloaders_every",
                "reload_dataloaders_every_n_epochs",
                reload_dataloaders_every_n_epochs,
                0,
            )
            interval = read_interval(
                "reload_dataloaders_every", reload_dataloaders_every, "epochs"
            )
            reload_dataloaders_every_n_epochs = interval.count("epochs") or 0
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.inference_mode = inference_mode
        self.use_distributed_sampler = use_distributed_sampler
        self.detect_anomaly = detect_anomaly
        self.deterministic = deterministic
        self.benchmark = benchmark
        read_compilation(compile)
        self.compile = compile
        self.auto_requeue = auto_requeue
        self.barebones = barebones
        self.fast_dev_run = int(fast_dev_run)
        self.default_root_dir = os.path.expanduser(
            without_local_scheme(os.fspath(default_root_dir or os.getcwd()))
        )

        switches = {
            "logger": logger,
            "enable_checkpointing": enable_checkpointing,
            "profiler": profiler,
            "enable_progress_bar": enable_progress_bar,
            "enable_model_summary": enable_model_summary,
        }
        if barebones and (
            requested := [name for name, value in switches.items() if value]
        ):
            raise ValueError(
                f"barebones=True switches {', '.join(requested)} off; do not ask for both"
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
            hang_timeout=hang_timeout,
            launch=False,
        )
        self.engine.keep_gradients_local(micro_batch is not None)
        self.loggers: list[Logger] = self._make_loggers(logger)
        self.callbacks: list[Callback] = default_callbacks(
            callbacks,
            requested={
                "ModelCheckpoint": enable_checkpointing,
                "ProgressBar": enable_progress_bar,
                "ModelSummary": enable_model_summary,
            },
            defaults=self._default_callbacks(),
            max_time=max_time,
            profiler=self.profiler,
        )
        if fingerprint is not None:
            from .report.fingerprints import Fingerprints

            self.callbacks = order_callbacks(
                [Fingerprints(fingerprint), *self.callbacks]
            )
        self.state = RunState()
        self.consensus = Consensus(self.engine.strategy)
        self.metrics = Metrics(self.engine.strategy, enabled=not barebones)
        self.checkpoints = RunCheckpoints(self)
        self.record: NoRecord = NoRecord()
        if enable_record and self.loggers and not quiet:
            from .report.record import Record

            self.record = Record()
        request = asked()
        if request is not None:
            self._begin_replay(request)
        # It is None before the first run, and in a copy. Its type leaves that out, for all that is read inside a run.
        self.run: Run = None  # type: ignore[assignment]
        self.last_fit: FitState | None = None
        self._module_callbacks: tuple[Module | None, list[Callback]] = (None, [])
        # In a copy that has not run: what the original's last run was of.
        self._of_original: dict[str, Any] = dict.fromkeys(
            ("module", "datamodule", "ckpt_path")
        )

    def _begin_replay(self, request: Asked) -> None:
        """Run as the program did that is run again, and leave nothing."""
        from .report.replay import Replay

        replay = Replay(request)
        self.record = replay
        self.loggers = replay.silent_loggers(self.loggers)
        self.default_root_dir = request.scratch
        self.detect_anomaly |= request.detect_anomaly
        self.auto_requeue = False
        self.use_distributed_sampler = replay.deals_out(self.use_distributed_sampler)

    # Arguments.

    def _limit_to(self, num_batches: int) -> None:
        """Run ``num_batches`` of everything, once, for ``fast_dev_run``."""
        self.limit_train_batches = num_batches
        self.limit_val_batches = num_batches
        self.limit_test_batches = num_batches
        self.limit_predict_batches = num_batches
        self.max_epochs = 1
        self.max_steps = num_batches
        self.val_check_interval = 1.0
        self.check_val_every_n_epoch = 1
        self.validation_interval = None

    def _make_loggers(self, logger: Any) -> list[Logger]:
        if logger is False or self.barebones:
            return []
        if self.fast_dev_run:
            return [DummyLogger()]
        if logger is None or logger is True:
            logger = "tensorboard"
        is_list = isinstance(logger, Sequence) and not isinstance(logger, str)
        loggers = [
            builtin_loggers.named_logger(each, self.default_root_dir)
            if isinstance(each, str)
            else each
            for each in (logger if is_list else [logger])
        ]
        return check_loggers(
            loggers, "a Logger, the name of one, a list of them, True or False"
        )

    def _default_callbacks(self) -> list[str]:
        """The kinds of callbacks that take part unless the user says otherwise."""
        defaults = []
        if not self.barebones and not self.fast_dev_run:
            defaults.append("ModelCheckpoint")
        if not self.barebones and not self.engine.is_copy:
            defaults += ["ProgressBar", "ModelSummary"]
        return defaults

    # The four runs.

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
        execute(
            self,
            self._request("fit", model, datamodule, given, ckpt_path, weights_only),
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
        """Test once.

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
            "test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

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
        results = execute(
            self,
            self._request(
                stage, model, datamodule, {stage: dataloaders}, ckpt_path, weights_only
            ),
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
        keep: Any = return_predictions
        if return_predictions is None:
            keep = "all" if self.engine.must_launch else "own"
        elif return_predictions is True:
            keep = "own"
        elif return_predictions is False:
            keep = "none"
        given = {"predict": dataloaders}
        request = self._request(
            "predict",
            model,
            datamodule,
            given,
            ckpt_path,
            weights_only,
            keep,
        )
        outputs = execute(self, request)
        if return_predictions is False:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    def _request(
        self,
        fn: str,
        model: Any,
        datamodule: Any,
        given: dict[str, Any],
        ckpt_path: Any,
        weights_only: bool | None,
        keep: str = "own",
    ) -> RunRequest:
        """Check the arguments of a run, before anything is set up or started; ``given`` are its loaders by stage."""
        model = uncompiled(model)
        if weights_only not in (None, True, False):
            raise ValueError(
                f"weights_only must be True, False or None; got {weights_only!r}"
            )
        if ckpt_path is not None and not isinstance(ckpt_path, (str, os.PathLike)):
            raise TypeError(
                f'ckpt_path must be a path, "best", "last" or None; got {ckpt_path!r}'
            )
        # A DataModule may be passed in the place of the first loaders.
        stage = next(iter(given))
        if isinstance(given[stage], DataModule) and datamodule is None:
            datamodule = given[stage]
            given[stage] = None
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
            # Whoever names no model wants the best one that the last fit has found, and not the last one.
            best = getattr(self.checkpoint_callback, "best_model_path", "")
            was_fitted = self.last_fit is not None and self.last_fit.module is model
            if ckpt_path is None and was_fitted and best:
                ckpt_path = "best"
        check_run(self, fn, model, datamodule, given)
        return RunRequest(fn, model, datamodule, given, ckpt_path, weights_only, keep)

    def use_callbacks_of(self, module: Module) -> None:
        """Use the callbacks that a module configures, instead of those of the module that ran before."""
        previous_module, previous = self._module_callbacks
        merged, configured = with_module_callbacks(
            self.callbacks, module, previous, is_same=previous_module is module
        )
        self.callbacks = merged
        self._module_callbacks = (module, configured)

    # Going back, and leaving data out.

    def rewind(self, batches: Iterable[tuple[int, int]]) -> NoReturn:
        """Go back to the newest checkpoint before these batches, and on from there without them.

        For training hooks of ``fit``, in all processes; it does not return. The run goes on as one that resumes from
        the checkpoint does, in the order of the data that it had: weights, optimizers, counters, random generators,
        callbacks and the loggers' rows are those of the checkpoint, and ``on_train_start`` is called again. It must be
        one that a callback has saved in this fit, or that the fit was resumed from. Later ones are renamed: they end in
        ``.taken-back``, and ``ckpt_path="last"`` does not find them.

        Args:
            batches: what to leave out, each batch by its epoch and its ``batch_idx``, in each process.

        Raises:
            CheckpointError: if no such checkpoint is left.
            RuntimeError: outside of training; or if the training loader can be read once only.
        """
        if self.state.fn != "fit" or not self.is_running:
            raise RuntimeError("rewind is for hooks of fit")
        rewind(self.run, batches)

    def skip_step(self) -> None:
        """Drop the accumulation window that is about to end: no step of optimizers, schedulers or the loss scale.

        For ``on_before_optimizer_step``, in all processes. ``global_step`` does not count it.

        Raises:
            RuntimeError: where :attr:`can_skip_step` is False.
        """
        if not self.can_skip_step:
            raise RuntimeError(
                "skip_step is for fit with automatic optimization, an optimizer that takes no closure, and a strategy "
                f"other than DeepSpeed's; this is {self.strategy.name!r}"
            )
        step: Any = self._step
        step.drop_window()

    @property
    def can_skip_step(self) -> bool:
        """Whether :meth:`skip_step` can be called in this fit."""
        is_automatic = isinstance(self._step, AutomaticStep)
        return is_automatic and not self.strategy.capabilities.owns_loss_scale

    def skip_batches(self, batches: Iterable[int], epoch: int | None = None) -> None:
        """Leave batches of an epoch out: nothing is trained on them, and nothing else changes.

        For hooks of ``fit`` before the epoch's first batch, as ``on_train_start``, in all processes. They are a part of
        the data's position in checkpoints, so a run that resumes leaves them out, too, with any number of processes.
        ``on_train_batch_end`` gets None for such a batch and its outputs.

        Args:
            batches: their ``batch_idx``, in each process.
            epoch: of which epoch (default: the running one).

        Raises:
            RuntimeError: outside of ``fit``.
        """
        if self.state.fn != "fit" or not self.is_running:
            raise RuntimeError("skip_batches is for hooks of fit")
        epoch = self.state.epoch if epoch is None else epoch
        self.run.loaders.load_train()
        self.run.loaders.leave_out((epoch, batch_idx) for batch_idx in batches)

    def samples_of(self, batch_idx: int, epoch: int | None = None) -> list[Any] | None:
        """The indices in the dataset of the samples that this process has in a training batch.

        Args:
            batch_idx: the batch's index.
            epoch: its epoch (default: the running one).

        Returns:
            The indices; of several loaders, pairs of a loader's number and an index; None for loaders without indices,
            such as streams, lists of batches, and those that keep a state of their own.
        """
        if self.run is None or self.run.loaders.train is None:
            return None
        epoch = self.state.epoch if epoch is None else epoch
        return self.run.loaders.train.samples_of(epoch, batch_idx)

    # Trying something out.

    def rehearse(
        self,
        steps: int,
        callbacks: Sequence[Callback] = (),
        together: bool = False,
    ) -> Trainer:
        """Take some optimizer steps of a running fit, or run some batches of an evaluation, and undo all of it.

        Afterwards, the weights, buffers, gradients and plain attributes of the module, optimizers, the loss scale,
        random generators, loaders, counters and logged values are as before. The steps are those of an epoch, without
        validation, schedulers, loggers and other callbacks. For callbacks that look for something, in a hook before
        an epoch's first batch. All processes call this.

        Args:
            steps: how many optimizer steps; of an evaluation, batches of each loader.
            callbacks: those that take part. They set ``should_stop`` in all processes after the same batch, if at all.
            together: with several processes, let all leave if memory runs out in one of them.

        Returns:
            A copy of the Trainer, which has run them, and has their loaders.

        Raises:
            RuntimeError: if nothing is running, or an epoch's batches are.
            NotImplementedError: under DeepSpeed, whose steps cannot be undone.
            torch.OutOfMemoryError: if memory ran out, for which all is as before, too.
            ValueError: if the training loader can be read once only, or if the strategy or the step does not allow
                ``together``.
        """
        if not self.is_running or (self.training and self.batch_idx):
            raise RuntimeError(
                "rehearse is called in a hook, before an epoch's first batch, such as on_fit_start or "
                f"on_train_epoch_start; this Trainer is at {self.state.where}, {self.state.status}"
            )
        if not self.strategy.capabilities.undoes_steps and self.run.fn == "fit":
            raise NotImplementedError(
                f"steps of strategy={self.strategy.name!r} cannot be undone: look for what you look for with "
                'strategy="ddp" or "fsdp", and set it'
            )
        trial = self._copy_with([*callbacks])
        # From an epoch's begin, with all else as it is.
        trial.state = RunState(
            self.current_epoch, global_step=self.global_step, seed=self.state.seed
        )
        trial.state.begin(self.run.fn)
        trial.state.start()
        trial.barebones = True
        trial.max_epochs = -1
        trial.max_steps = self.global_step + steps
        trial.min_epochs = trial.min_steps = None
        trial.num_sanity_val_steps = 0
        if self.run.fn == "fit":
            trial.limit_val_batches = 0
        rehearse(self.run, trial, steps, together)
        return trial

    def call_in_run(
        self,
        search: Callable[[Trainer, Module], Any],
        model: Module,
        dataloaders: dict[str, Any],
        datamodule: DataModule | None = None,
        method: str = "fit",
    ) -> Any:
        """Set a run up, call a function in the place of its loop, and end it; the Trainer stays as it was.

        Of its callbacks, those take part that only observe, but for the progress bar, the summary and averages.

        Args:
            search: called with a copy of the Trainer and the module. It may call :meth:`rehearse`.
            model: the module.
            dataloaders: the loaders by stage: ``"train"`` and ``"validate"``, ``"test"`` or ``"predict"``.
            datamodule: a ``DataModule`` instead of the loaders.
            method: which run to set up: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Returns:
            What the function returned, in the main process where processes are started for it.
        """
        if self.last_fit is not None and self.last_fit.step is not None:
            # Its optimizers do not outlive another run of their strategy.
            states = full_state(self.strategy, self.last_fit.states())
            self.last_fit = self.last_fit.detached(states)
        shown = (builtin_callbacks.ProgressBar, builtin_callbacks.ModelSummary)
        observers = [
            callback
            for callback in self.callbacks
            if callback.phase == "observe"
            and callback.weight_set is None
            and not isinstance(callback, shown)
        ]
        other = self._copy_with(observers)
        other.state = RunState(seed=self.state.seed)
        other.last_fit = None
        request = other._request(method, model, datamodule, dataloaders, None, None)
        with isolated_rng(None if self.engine.must_launch else self.engine.device):
            try:
                return execute(other, replace(request, search=search))
            finally:
                request.module.trainer = self

    def _copy_with(self, callbacks: list[Callback]) -> Trainer:
        """A copy that runs on the same engine, with other callbacks, and with requests and logged values of its own."""
        other = copy.copy(self)
        other.callbacks = callbacks
        other.loggers = [DummyLogger() for _ in self.loggers[:1]]
        other.consensus = Consensus(self.strategy, alike=True)
        other.metrics = Metrics(self.strategy, enabled=self.metrics.enabled)
        other.record = NoRecord()
        return other

    def plan(
        self,
        model: Module,
        batch: Any = None,
        *,
        datamodule: DataModule | None = None,
        memory: str | int | float | None = None,
        accelerator: str | None = None,
        devices: int | Sequence[int] | None = None,
        strategies: Sequence[str] | None = None,
        precisions: Sequence[int | str | Precision] | None = None,
        micro_batches: Sequence[int] | None = None,
        activation_checkpointing: Any = None,
        margin: float = 0.1,
    ) -> Plan:
        """Tell how much memory a training would take of each process, before any of it is taken.

        A step is followed on tensors without memory; the module, its data and the random generators stay as they are.
        Each choice is one row: a strategy, a precision, a micro-batch, with or without activation checkpointing.

        Args:
            model: the module. Layers that ``configure_model`` makes, or that are on the meta device, take no memory.
            batch: a batch of one process, or a loader, of which the first batch counts. Default: the module's own
                ``train_dataloader``.
            datamodule: a ``DataModule`` instead, whose training loader gives the batch.
            memory: of each device, in bytes or as ``"80GB"``, ``"24GiB"``. Default: that of the device here; of the
                CPU, each process's part of it.
            accelerator: the kind of device to plan for, as of the Trainer. Default: the Trainer's.
            devices: number of processes, or several numbers. Default: the Trainer's.
            strategies: among ``"single"``, ``"ddp"``, ``"fsdp"``, ``"deepspeed_stage_2"`` and ``"deepspeed_stage_3"``.
                Default: all of them. The Trainer's own counts with its options.
            precisions: names, or objects. Default: the Trainer's; beside ``"32-true"`` also ``"bf16-mixed"``.
            micro_batches: numbers of samples. Default: the batch's, and halves of it until something fits.
            activation_checkpointing: which submodules compute their activations again, as of the strategies; False for
                none; or a list of such choices. Default: the Trainer's; else none, and the blocks of which the module
                has most.
            margin: the part of the memory that is left to what is not counted: the device's own, and what lies idle.

        Raises:
            ValueError: for arguments that are not as described, or a module that an earlier fit has divided among
                processes.
        """
        # It imports the strategies, of which a run needs one.
        from .report.plan.planner import Request, make_plan

        trial = self._copy_with([])
        trial.metrics = Metrics(self.strategy, enabled=False)
        trial.state = RunState(seed=self.state.seed)
        trial.state.begin("fit")
        request = Request(
            memory,
            accelerator,
            devices,
            strategies,
            precisions,
            micro_batches,
            activation_checkpointing,
            margin,
        )
        return make_plan(trial, model, batch, datamodule, request)

    def reconfigure_optimizers(self) -> None:
        """Call ``configure_optimizers`` again, as with another learning rate, before the first step of a fit.

        Raises:
            RuntimeError: at any other time.
        """
        if not self.is_running or self._step is None or self.global_step:
            raise RuntimeError(
                "reconfigure_optimizers is called before the first optimizer step of a fit, such as in on_fit_start"
            )
        begin_step(self.run)

    def reload_dataloaders(self) -> None:
        """Make the loaders of the run again, as with another batch size, before an epoch's first batch."""
        self.run.loaders.reload()

    # Checkpoints and logging.

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = False,
        storage_options: Any = None,
        save_format: Literal["folder", "file"] | None = None,
    ) -> None:
        """Write a checkpoint; when this returns, it is complete and on disk. All processes call this.

        The main process may call it alone where it has all of the state; the checkpoint then lacks the others' random
        states and what they have logged in the running epoch. Inside an accumulation window, the position that is saved
        is the window's start: a run that resumes reads the window's batches again.

        Args:
            filepath: the directory or file to make, local or any fsspec URL.
            weights_only: leave out all that only resuming needs.
            storage_options: accepted for familiarity; must be None (fsspec is configured by its own means).
            save_format: ``"folder"``: a directory, in which processes may write their own shards; ``"file"``: one file
                that ``torch.load(weights_only=True)`` opens; None: the Trainer's :attr:`save_format`.

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
        if self.record.is_replay:
            return
        together = self.engine.all_call(
            "save_checkpoint", alone=can_save_alone(self.run)
        )
        save_run(
            self.run,
            os.fspath(filepath),
            bool(weights_only),
            together=together,
            save_format=save_format,
        ).finish()

    def export(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        weight_set: str | None = None,
    ) -> None:
        """Write the module's weights, and nothing else, to one safetensors file.

        All processes call this, or the main one alone where it has all of the weights.

        Args:
            path: the file, local or any fsspec URL; an existing file stays as it is until the new one is complete.
            dtype: to convert floating-point weights to, such as ``torch.bfloat16``.
            weight_set: write those that a callback keeps by this name, such as ``"ema"``, and not those that are
                trained.

        Raises:
            RuntimeError: before the first run.
            ValueError: if ``path`` is a folder, or no callback keeps such a ``weight_set``.
            OSError: if it cannot be written.
        """
        if self.module is None:
            raise RuntimeError(
                "export: this Trainer has run nothing yet; call fit first"
            )
        if self.record.is_replay:
            return
        together = self.engine.all_call(
            "export",
            alone=self.is_global_zero and not self.strategy.capabilities.shards_state,
        )
        file = os.fspath(path)
        with weight_sets.saving(self.run):
            state = full_state(self.strategy, weight_sets.state(self.run, weight_set))
            on_main_rank(
                self.strategy,
                file,
                lambda: export_weights(state, file, dtype),
                together,
            )

    def forward_training_batches(self) -> None:
        """At a fit's end, run ``training_step`` on an epoch of training batches: without gradients, and without hooks.

        What it logs does not count. This is for what a forward pass computes, such as the statistics of batch norms.
        All processes call it, each with its own batches; in manual optimization, the step itself would train.
        """
        forward_training_batches(self.run)

    def log_row(self, values: dict[str, Any], step: int | None = None) -> None:
        """Write one row to the loggers.

        Args:
            values: by name.
            step: of the row. None stands for the global step, and adds the epoch to the row.
        """
        if not values or not self.loggers or not self.is_global_zero:
            return
        row = as_floats(values)
        if step is None:
            step = self.state.global_step
            row = {"epoch": self.state.epoch, **row}
        for logger in self.loggers:
            logger.log_metrics(row, step=step)
        self.record.add_row(step, row)

    def log_media(self, kind: str, name: str, value: Any, **options: Any) -> None:
        """Give an image, text, table, histogram or sound to the loggers, with the global step; the main process does.

        Args:
            kind: ``"image"``, ``"text"``, ``"table"``, ``"histogram"`` or ``"audio"``.
            name: under which it appears.
            value: as ``log_image`` and its siblings of :class:`~loopwright.framework.Module` describe it.
            **options: as of these.
        """
        if not self.loggers or not self.is_global_zero or self.sanity_checking:
            return
        media = as_media(kind, name, value, **options)
        for logger in self.loggers:
            logger.log_media(kind, name, media, step=self.state.global_step)
        self.record.add_media(kind, name, media, self.state.global_step)

    def report(self, output: str | os.PathLike[str] | None = None) -> str | None:
        """Write a page that shows this run: curves, where its time went, checkpoints, settings, how it ended.

        It is one HTML file that needs no network. ``loopwright report`` writes the same, and pages of several runs.

        Args:
            output: the file. By default ``report.html`` in :attr:`log_dir`.

        Returns:
            Its absolute path; None in all processes but the main one.

        Raises:
            FileNotFoundError: if the run has left nothing to show, as with ``logger=False``.
        """
        from .report.page.document import write_report

        if not self.is_global_zero:
            return None
        for logger in self.loggers:
            logger.save()
        return write_report([self.log_dir], output)

    @property
    def enable_validation(self) -> bool:
        """Whether ``fit`` validates: there is a loader, a ``validation_step`` and a limit above 0."""
        if not self.limit_val_batches:
            return False
        if not overrides(self.module, "validation_step", Module):
            return False
        return self.run.loaders.has("validate")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main rank only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A run holds functions and loaders that are bound to this process, so a copy makes its own when it runs. It
        # goes on with the states of optimizers and schedulers.
        state = self.state
        if self.is_running:
            state = replace(
                state, fn=None, stage=None, status=TrainerStatus.INITIALIZING
            )
        last_fit = self.last_fit
        if last_fit is not None and last_fit.step is not None:
            last_fit = last_fit.detached()
        of_original = {
            "module": self.module,
            "datamodule": self.datamodule,
            "ckpt_path": self.ckpt_path,
        }
        return {
            **self.__dict__,
            "run": None,
            "last_fit": last_fit,
            "state": state,
            "_of_original": of_original,
        }

    @property
    def must_end_at_once(self) -> bool:
        """Whether the user has pressed Ctrl-C a second time."""
        return self.run is not None and self.run.signals.in_a_hurry

    def validation_follows(self) -> bool:
        """Whether validation comes right after the training batch that has just ended."""
        return self.run.schedule.validation_follows()

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches per optimizer step.

        Set inside ``fit``, it counts from the next window on, and for runs that resume this one.

        Raises:
            ValueError: if it is set to something else than an integer from 1.
        """
        return self._accumulate_grad_batches

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, batches: int) -> None:
        check_count("accumulate_grad_batches", batches, 1)
        self._accumulate_grad_batches = batches
        if self.state.fn == "fit" and self.state.status == "running":
            self.state.use_accumulation(batches)
            if self._step is not None:
                self._step.change_accumulation()

    @property
    def _step(self) -> Step | None:
        """The optimizers of this fit, or of the last one, if they live in this process."""
        return None if self.run is None else self.run.live_step

    # How far the run has come, and where it runs.

    @property
    def module(self) -> Module:
        """The module of this run, or of the last one; None before the first."""
        return self._of_original["module"] if self.run is None else self.run.module

    model = lightning_module = module

    @property
    def datamodule(self) -> DataModule | None:
        """The ``DataModule`` of this run, or of the last one."""
        if self.run is None:
            return self._of_original["datamodule"]
        return self.run.datamodule

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that this run, or the last one, has read."""
        if self.run is None:
            return self._of_original["ckpt_path"]
        return self.run.ckpt_path

    @property
    def current_epoch(self) -> int:
        """Index of the running epoch; after it, the number of completed ones."""
        return self.state.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps so far: completed accumulation windows, however many optimizers step in each."""
        return self.state.global_step

    @property
    def batch_idx(self) -> int:
        """Micro-batches finished in the running epoch."""
        return self.state.batch_idx

    @property
    def num_tokens(self) -> float:
        """The sum of the weights that ``training_step`` has returned, such as tokens. Reading waits for the device."""
        return float(self.state.tokens.total)

    @property
    def window_is_open(self) -> bool:
        """Whether gradients of micro-batches wait for those that complete their accumulation window."""
        return self.run is not None and self.run.window_is_open

    @property
    def is_last_batch(self) -> bool:
        """Whether the running training batch is its epoch's last, where that is certain beforehand."""
        if self.run is None:
            return False
        most = self.run.loaders.max_batches.get("train", INFINITE)
        return self.state.batch_idx + 1 >= most

    @property
    def should_stop(self) -> bool:
        """Whether to end the training after this step. If any process sets it, all end, about a second later."""
        return self.consensus.stop_requested or self.consensus.stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self.consensus.request_stop(stop)

    @property
    def sync_batchnorm(self) -> bool:
        """Whether batch norms compute their statistics over all processes."""
        return self.engine.strategy.sync_batchnorm

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        environment = self.engine.environment
        return 1 if environment is None else environment.num_nodes

    @property
    def num_devices(self) -> int:
        """Number of devices, and so of processes, on this machine."""
        return len(self.engine.devices)

    @property
    def device_ids(self) -> list[int]:
        """Indices of these devices among those of their kind; of CPUs, those of the processes."""
        devices = enumerate(self.engine.devices)
        return [i if device.index is None else device.index for i, device in devices]

    @property
    def strategy(self) -> Strategy:
        """The strategy."""
        return self.engine.strategy

    @property
    def precision(self) -> str:
        """Name of the precision."""
        return self.engine.precision.name

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.engine.strategy.world_size

    @property
    def global_rank(self) -> int:
        """This process's index among all."""
        return self.engine.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """This process's index on its machine."""
        return self.engine.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """This machine's index."""
        return self.engine.strategy.group.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main process."""
        return self.engine.strategy.is_global_zero

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers."""
        return [] if self._step is None else self.engine.strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        if self._step is None:
            raise RuntimeError(
                "optimizers can be replaced once fit has called configure_optimizers"
            )
        check_new_optimizers(self, optimizers)
        self._step.replace_optimizers(self.engine.setup_optimizers(optimizers))

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers and when they step; may be set during a fit, to what ``configure_optimizers`` may return."""
        return [] if self._step is None else self._step.schedulers.configs

    @lr_scheduler_configs.setter
    def lr_scheduler_configs(self, schedulers: list[Any]) -> None:
        if self._step is None:
            raise RuntimeError("lr_scheduler_configs can be set during a fit only")
        self._step.replace_schedulers(schedulers)

    @property
    def training(self) -> bool:
        """Whether a training epoch runs."""
        return self.state.stage == "train"

    @property
    def validating(self) -> bool:
        """Whether validation runs."""
        return self.state.stage == "validate"

    @property
    def is_running(self) -> bool:
        """Whether ``fit``, ``validate``, ``test`` or ``predict`` runs."""
        return self.state.status == "running"

    @property
    def testing(self) -> bool:
        """Whether testing runs."""
        return self.state.fn == "test" and self.is_running

    @property
    def predicting(self) -> bool:
        """Whether prediction runs."""
        return self.state.fn == "predict" and self.is_running

    @property
    def sanity_checking(self) -> bool:
        """Whether the sanity check runs."""
        return self.state.stage == "sanity_check"

    @property
    def evaluating(self) -> bool:
        """Whether validation, the sanity check, or testing runs."""
        return self.validating or self.testing or self.sanity_checking

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended by Ctrl-C."""
        return self.state.status == "interrupted"

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def log_dir(self) -> str:
        """The first logger's folder of this run, or ``default_root_dir``."""
        folder = self.logger.log_dir if self.logger is not None else None
        return folder if folder is not None else self.default_root_dir

    @property
    def record_dir(self) -> str | None:
        """The folder of the record of this run, or of the last one; None if there is none."""
        return self.record.folder

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first ``ModelCheckpoint``, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """All ``ModelCheckpoint`` callbacks."""
        kind = builtin_callbacks.ModelCheckpoint
        return [callback for callback in self.callbacks if isinstance(callback, kind)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first ``EarlyStopping``, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """All ``EarlyStopping`` callbacks."""
        kind = builtin_callbacks.EarlyStopping
        return [callback for callback in self.callbacks if isinstance(callback, kind)]

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        kind = builtin_callbacks.ProgressBar
        return next((c for c in self.callbacks if isinstance(c, kind)), None)

    # What was logged.

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All that was logged, as 0-dim tensors: the newest values by name."""
        return as_tensors(self.metrics.current().callback)

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What was logged for loggers."""
        return as_tensors(self.metrics.current().logged)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged for the progress bar. Reading it waits for the device."""
        return as_floats(self.metrics.current().progress_bar)

    # Data.

    def batch_size_of(self, batch: Any) -> int:
        """How many samples a batch holds: the first dimension of its tensors.

        Args:
            batch: of any nesting.

        Raises:
            ValueError: if it does not show one size.
        """
        return batch_size_of(batch)

    @property
    def num_training_batches(self) -> int | float:
        """Training batches in an epoch of the last fit; infinite if the loader does not tell, or before it is made.

        What a stream tells is an estimate: it is read to its end.
        """
        fit = self.last_fit
        known = INFINITE
        if fit is not None and fit.step is not None:
            known = fit.step.run.loaders.num_batches.get("train", INFINITE)
        return self._num_batches("train", known)

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader."""
        return self._num_batches("validate", [])

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of each loader in the sanity check."""
        limit: int | float = self.num_sanity_val_steps
        if limit == -1:
            limit = INFINITE
        return [min(limit, batches) for batches in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self._num_batches("test", [])

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches to predict of each loader."""
        return self._num_batches("predict", [])

    def _num_batches(self, stage: str, default: Any) -> Any:
        if self.run is None:
            return default
        return self.run.loaders.num_batches.get(stage, default)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run; for learning-rate schedules. Makes the training loader if need be.

        Raises:
            RuntimeError: outside of ``fit``.
        """
        if self.run is None:
            raise RuntimeError(
                "estimated_stepping_batches is known inside fit, such as in configure_optimizers"
            )
        self.run.loaders.load_train()
        batches = self.num_training_batches
        if self.max_epochs in (None, -1) or batches == INFINITE:
            return self.max_steps if self.max_steps != -1 else INFINITE
        total = sum(
            math.ceil(batches / self._accumulation_in(epoch))
            for epoch in range(self.max_epochs)
        )
        return total if self.max_steps == -1 else min(total, self.max_steps)

    def _accumulation_in(self, epoch: int) -> int:
        """Micro-batches per optimizer step in an epoch, by a ``GradientAccumulationScheduler`` if there is one."""
        kind = builtin_callbacks.GradientAccumulationScheduler
        for callback in self.callbacks:
            if isinstance(callback, kind):
                return callback.get_accumulate_grad_batches(epoch)
        return self.accumulate_grad_batches

    @property
    def predict_batch_indices(self) -> list[Any] | None:
        """Indices in the dataset of the samples of the batch that is predicted; None where the loader does not tell.

        A ``DataLoader`` over a dataset with ``__getitem__`` tells, with any sampler and any number of processes.
        """
        return None if self.run is None else self.run.loaders.batch_indices

    @property
    def train_dataloader(self) -> Any:
        """The training loader, as the user gave it."""
        return None if self.run is None else self.run.loaders.loaders.get("train")

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or the list of several."""
        return self._evaluation_loaders("validate")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader, or the list of several."""
        return self._evaluation_loaders("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The loader to predict, or the list of several."""
        return self._evaluation_loaders("predict")

    def _evaluation_loaders(self, stage: str) -> Any:
        if self.run is None:
            return None
        loaders = self.run.loaders.loaders.get(stage)
        return loaders[0] if loaders is not None and len(loaders) == 1 else loaders


def _refuse_both(name: str, other: str, value: Any, default: Any) -> None:
    """Raise if ``other`` is given beside ``name``, which sets the same."""
    if value != default:
        raise ValueError(f"{name} and {other}={value!r} set the same: pass one of them")
