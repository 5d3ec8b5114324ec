"""What callbacks, loggers and modules read of a running Trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import callbacks as builtin_callbacks
from .arguments import check_count
from .data.iteration import INFINITE
from .metrics.values import as_floats, as_tensors

if TYPE_CHECKING:
    from ..callbacks.base import Callback
    from ..loggers.base import Logger
    from ..strategies import Strategy
    from .checkpoint.schema import RunState
    from .engine.engine import Engine
    from .loop.consensus import Control
    from .loop.loaders import RunData
    from .loop.optimizers import LRSchedulerConfig
    from .loop.step import Optimization
    from .metrics.metrics import Metrics
    from .module import Module


class TrainerAttributes:
    """The Trainer's attributes that follow from its state; :class:`~loopwright.framework.Trainer` holds the state."""

    if TYPE_CHECKING:
        _accumulate_grad_batches: int
        callbacks: list[Callback]
        control: Control
        data: RunData
        default_root_dir: str
        engine: Engine
        fitted: bool
        loggers: list[Logger]
        max_epochs: int | None
        max_steps: int
        metrics: Metrics
        module: Module
        num_sanity_val_steps: int
        optimization: Optimization
        state: RunState

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
            self.state.accumulate_grad_batches = batches
            if self.fitted:
                self.optimization.change_accumulation()

    # -- progress and place -----------------------------------------------------------------------------------

    @property
    def model(self) -> Module:
        """The running module."""
        return self.module

    lightning_module = model

    @property
    def current_epoch(self) -> int:
        """Index of the running epoch; after it, the number of completed ones."""
        return self.state.epoch

    @property
    def global_step(self) -> int:
        """Completed optimizer windows."""
        return self.state.global_step

    @property
    def batch_idx(self) -> int:
        """Micro-batches finished in the running epoch."""
        return self.state.batch_idx

    @property
    def window_is_open(self) -> bool:
        """Whether gradients of micro-batches wait for those that complete their accumulation window."""
        return self.fitted and self.optimization.window_is_open

    @property
    def is_last_batch(self) -> bool:
        """Whether the running training batch is its epoch's last, where that is certain beforehand."""
        most = (
            self.data.max_batches.get("train", INFINITE)
            if self.data is not None
            else INFINITE
        )
        return self.state.batch_idx + 1 >= most

    @property
    def should_stop(self) -> bool:
        """Whether to end the training after this step. If any process sets it, all end, about a second later."""
        return self.control.wants_stop or self.control.stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self.control.ask_to_stop(stop)

    @property
    def sync_batchnorm(self) -> bool:
        """Whether batch norms compute their statistics over all processes."""
        return self.engine.strategy.sync_batchnorm

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return (
            self.engine.environment.num_nodes
            if self.engine.environment is not None
            else 1
        )

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
    def is_global_zero(self) -> bool:
        """Whether this is the main process."""
        return self.engine.strategy.is_global_zero

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers."""
        return self.engine.strategy.optimizers if self.fitted else []

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        if not self.fitted:
            raise RuntimeError(
                "optimizers can be replaced once fit has called configure_optimizers"
            )
        self.optimization.replace_optimizers(self.engine.setup_optimizers(optimizers))

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers and when they step."""
        return self.optimization.schedulers if self.fitted else []

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
    def checkpoint_callback(self) -> Any:
        """The first ``ModelCheckpoint``, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """All ``ModelCheckpoint`` callbacks."""
        return [
            callback
            for callback in self.callbacks
            if isinstance(callback, builtin_callbacks.ModelCheckpoint)
        ]

    @property
    def early_stopping_callback(self) -> Any:
        """The first ``EarlyStopping``, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """All ``EarlyStopping`` callbacks."""
        return [
            callback
            for callback in self.callbacks
            if isinstance(callback, builtin_callbacks.EarlyStopping)
        ]

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, or None."""
        return next(
            (c for c in self.callbacks if isinstance(c, builtin_callbacks.ProgressBar)),
            None,
        )

    # -- what was logged --------------------------------------------------------------------------------------

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

    # -- data -------------------------------------------------------------------------------------------------

    @property
    def num_training_batches(self) -> int | float:
        """Training batches in an epoch; infinite if the loader does not tell, or before it is made.

        What a stream tells is an estimate: it is read to its end.
        """
        return (
            self.data.num_batches.get("train", INFINITE)
            if self.data is not None
            else INFINITE
        )

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader."""
        return (
            self.data.num_batches.get("validate", []) if self.data is not None else []
        )

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of each loader in the sanity check."""
        limit = (
            INFINITE if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        )
        return [min(limit, batches) for batches in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self.data.num_batches.get("test", []) if self.data is not None else []

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches to predict of each loader."""
        return self.data.num_batches.get("predict", []) if self.data is not None else []

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run; for learning-rate schedules. Makes the training loader if need be."""
        if self.data is None:
            raise RuntimeError(
                "estimated_stepping_batches is known inside fit, such as in configure_optimizers"
            )
        self.data.load_train()
        batches = self.num_training_batches
        if self.max_epochs in (None, -1) or batches == INFINITE:
            return self.max_steps if self.max_steps != -1 else INFINITE
        total = math.ceil(batches / self.accumulate_grad_batches) * self.max_epochs
        return total if self.max_steps == -1 else min(total, self.max_steps)

    @property
    def train_dataloader(self) -> Any:
        """The training loader, as the user gave it."""
        return self.data.loaders.get("train") if self.data is not None else None

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
        loaders = self.data.loaders.get(stage) if self.data is not None else None
        return loaders[0] if loaders is not None and len(loaders) == 1 else loaders
