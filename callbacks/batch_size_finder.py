"""Find the largest batch size that memory holds."""

from __future__ import annotations

from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch

from .arguments import is_number, require, require_choice, require_int
from .base import Callback
from .tuned_attributes import find_attribute, get_attribute, set_attribute

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class BatchSizeFinder(Callback):
    """Looks for the largest batch size that memory holds, when a run begins: tries some steps, and undoes them.

    The size is an attribute of the module, its data module or their hyperparameters, by which they make their loaders.
    With several processes, all go on with what fits in each of them. A fit that goes on, such as from a checkpoint,
    keeps the size that was found.

    To look at other moments, override :meth:`on_fit_start` and call :meth:`scale_batch_size`, such as in
    ``on_train_epoch_start``.

    Args:
        mode: ``"power"`` doubles the size until memory runs out; ``"binsearch"`` then halves the interval between the
            largest size that fits and the smallest that does not.
        steps_per_trial: how many optimizer steps, or batches of an evaluation, to try.
        init_val: the first size.
        max_trials: how many sizes to try at most.
        batch_arg_name: the attribute's name.
        margin: by what fraction to reduce the size that ``"binsearch"`` has found.
        max_val: the largest size to try.

    Attributes:
        optimal_batch_size: the size that was found; ``init_val`` before.

    Raises:
        ValueError: for arguments that are not as described; in a run, if nobody has the attribute, if loaders were
            passed, which cannot be made with another batch size, if there are several to evaluate, or with
            ``micro_batch``, which divides batches.
    """

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mode = str(mode).lower()
        require_choice("mode", mode, "power", "binsearch")
        is_part = is_number(margin) and 0.0 <= margin < 1.0
        require(is_part, "`margin`", "between 0 and 1", margin)
        require_int("steps_per_trial", steps_per_trial, 1)
        require_int("init_val", init_val, 1)
        require_int("max_trials", max_trials, 0)
        require_int("max_val", max_val, 1)
        self.mode = mode
        self.steps_per_trial = steps_per_trial
        self.init_val = init_val
        self.max_trials = max_trials
        self.batch_arg_name = batch_arg_name
        self.margin = margin
        self.max_val = max_val
        self.optimal_batch_size: int | None = init_val
        self._goes_on = False

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._goes_on or trainer.global_step:
            log.info("BatchSizeFinder: a fit that goes on keeps its batch size")
        else:
            self.scale_batch_size(trainer, pl_module)
        self._goes_on = False

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == "validate":
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scale_batch_size(trainer, pl_module)

    def scale_batch_size(self, trainer: Trainer, pl_module: Module) -> int | None:
        """Look for a batch size, in a hook before an epoch's first batch.

        Args:
            trainer: the Trainer that runs.
            pl_module: its module.

        Returns:
            The size; None under ``fast_dev_run``, or where no batch would be run, which looks for nothing.
        """
        if trainer.fast_dev_run:
            log.warning("fast_dev_run: no batch size is looked for")
            return None
        stage = {"fit": "train", "validate": "val"}.get(str(trainer.state.fn))
        limit = f"limit_{stage or trainer.state.fn}_batches"
        if getattr(trainer, limit) == 0:
            log.warning("%s=0: no batch size is looked for", limit)
            return None
        self._check(trainer, pl_module)
        before = get_attribute(trainer, pl_module, self.batch_arg_name)
        try:
            size = self._search(trainer, pl_module)
        except BaseException:
            set_attribute(trainer, pl_module, self.batch_arg_name, before)
            raise
        if self.mode == "binsearch":
            size = max(1, int(size * (1 - self.margin)))
        set_attribute(trainer, pl_module, self.batch_arg_name, size)
        trainer.reload_dataloaders()
        if trainer.state.fn == "fit" and trainer.global_step == 0:
            # Schedulers may have counted the batches of an epoch.
            trainer.reconfigure_optimizers()
        self.optimal_batch_size = size
        log.info("Batch size set to %d", size)
        return size

    def _search(self, trainer: Trainer, module: Module) -> int:
        """The largest size that is found to fit."""
        fits = 0
        too_large: int | None = None
        size = min(self.init_val, self.max_val)
        for _ in range(self.max_trials):
            samples = self._try(trainer, module, size)
            if samples is None:
                if size == 1:
                    raise torch.OutOfMemoryError(
                        f"{type(self).__name__}: memory does not suffice for a single sample"
                    )
                too_large = size
            else:
                fits = size
            if too_large is None:
                if size >= min(samples or size, self.max_val):
                    break
                size = min(2 * size, self.max_val)
            elif fits == 0:
                size = too_large // 2
            elif self.mode == "power" or too_large - fits <= 1:
                break
            else:
                size = (fits + too_large) // 2
        return fits or size

    def _try(self, trainer: Trainer, module: Module, size: int) -> float | None:
        """Try a size; returns the number of samples that there are, infinite if unknown, or None if memory ran out."""
        set_attribute(trainer, module, self.batch_arg_name, size)
        try:
            trial = trainer.rehearse(self.steps_per_trial, together=True)
        except torch.OutOfMemoryError:
            log.info("Batch size %d: out of memory", size)
            return None
        log.info("Batch size %d: fits", size)
        return self._most_samples(trial, str(trainer.state.fn))

    def _check(self, trainer: Trainer, module: Module) -> None:
        """Raise if there is nothing to set, or if setting it would change nothing."""
        name = self.batch_arg_name
        stage = "train" if trainer.state.fn == "fit" else trainer.state.fn
        if trainer.run.loaders.given.get(str(stage)) is not None:
            raise ValueError(
                f"The Batch size finder cannot be used with dataloaders passed directly to `.{trainer.state.fn}()`, as "
                "they are never made anew: make them in the module or in a DataModule"
            )
        if trainer.micro_batch is not None:
            raise ValueError(
                f"the batch size finder and micro_batch={trainer.micro_batch!r} exclude each other: with parts of a "
                "batch, any batch size fits"
            )
        if find_attribute(trainer, module, (name,)) is None:
            raise ValueError(
                f"Field {name} not found in `model`, `datamodule`, nor their `hparams` attributes."
            )

    def _most_samples(self, trial: Trainer, fn: str) -> float:
        """The number of samples of the largest dataset that a trial has read; infinite where one does not tell.

        Raises:
            ValueError: if there are several loaders of an evaluation.
        """
        names = {"fit": "train_dataloader", "validate": "val_dataloaders"}
        loaders = getattr(trial, names.get(fn, f"{fn}_dataloaders"))
        if isinstance(loaders, dict):
            loaders = [*loaders.values()]
        if not isinstance(loaders, (list, tuple)):
            loaders = [loaders]
        if fn != "fit" and len(loaders) > 1:
            raise ValueError(
                f"The Batch size finder cannot be used with multiple {fn} dataloaders; there are {len(loaders)}"
            )
        try:
            return max(len(loader.dataset) for loader in loaders)
        except (AttributeError, TypeError):
            return float("inf")

    # State.

    def state_dict(self) -> dict[str, Any]:
        return {"batch_size": self.optimal_batch_size}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        # Before the loaders are made.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state and trainer.state.fn == "fit":
            self._goes_on = True
            self.optimal_batch_size = size = state["batch_size"]
            set_attribute(trainer, pl_module, self.batch_arg_name, size)
