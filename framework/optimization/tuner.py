"""The Tuner: looks for a learning rate or a batch size before a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ...callbacks import BatchSizeFinder, LearningRateFinder

if TYPE_CHECKING:
    from ...callbacks.lr_finder import LearningRateResult
    from ..datamodule import DataModule
    from ..module import Module
    from ..trainer import Trainer


class Tuner:
    """Looks for a learning rate or a batch size, and sets it; the Trainer and its next run are as without.

    Args:
        trainer: with whose devices, strategy, precision and limits.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: Literal["fit", "validate", "test", "predict"] = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LearningRateResult | None:
        """Look for a learning rate; see :class:`~loopwright.callbacks.LearningRateFinder`.

        Args:
            model: the module; its learning rate is set.
            train_dataloaders: as of :meth:`Trainer.fit`.
            val_dataloaders: not used.
            dataloaders: must be None.
            datamodule: as of :meth:`Trainer.fit`.
            method: must be ``"fit"``.
            min_lr: where to begin.
            max_lr: where to end.
            num_training: optimizer steps from one to the other.
            mode: ``"exponential"`` or ``"linear"``.
            early_stop_threshold: end when the loss is this many times the best one; None for never.
            update_attr: set the module's learning rate to the suggestion.
            attr_name: its name, if it is neither ``lr`` nor ``learning_rate``.

        Returns:
            What was found, with ``suggestion()`` and ``plot()``; None under ``fast_dev_run``.

        Raises:
            ValueError: if an argument is not as described, or the Trainer has such a callback.
        """
        if method != "fit":
            raise ValueError(
                f"method='fit' is the only valid configuration to run lr finder; got {method!r}"
            )
        finder = LearningRateFinder(
            min_lr,
            max_lr,
            num_training,
            mode,
            early_stop_threshold,
            update_attr,
            attr_name,
        )
        data = (train_dataloaders, val_dataloaders, dataloaders)
        return self._tune(finder.lr_find, model, data, datamodule, method)

    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: Literal["fit", "validate", "test", "predict"] = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Look for the largest batch size that memory holds; see :class:`~loopwright.callbacks.BatchSizeFinder`.

        Args:
            model: the module.
            train_dataloaders: None, or a ``DataModule``: the loaders have to be made with each batch size.
            val_dataloaders: must be None.
            dataloaders: must be None, or a ``DataModule``, for the other methods.
            datamodule: as of :meth:`Trainer.fit`.
            method: what is to be run with this batch size.
            mode: ``"power"`` or ``"binsearch"``.
            steps_per_trial: how many steps to try.
            init_val: the first size.
            max_trials: how many sizes to try at most.
            batch_arg_name: the attribute of the module, its data module or their hyperparameters.
            margin: by what fraction to reduce what ``"binsearch"`` has found.
            max_val: the largest size to try.

        Returns:
            The size; None under ``fast_dev_run``.

        Raises:
            ValueError: if an argument is not as described, or the Trainer has such a callback.
        """
        finder = BatchSizeFinder(
            mode,
            steps_per_trial,
            init_val,
            max_trials,
            batch_arg_name,
            margin,
            max_val,
        )
        data = (train_dataloaders, val_dataloaders, dataloaders)
        return self._tune(finder.scale_batch_size, model, data, datamodule, method)

    def _tune(
        self,
        search: Callable[[Any, Any], Any],
        model: Module,
        data: tuple[Any, Any, Any],
        datamodule: DataModule | None,
        method: str,
    ) -> Any:
        train, validation, others = data
        trains = {"train": train, "validate": validation}
        if method not in ("fit", "validate", "test", "predict"):
            raise ValueError(
                f"method {method!r} is invalid. Should be one of fit, validate, test, predict."
            )
        if method == "fit" and others is not None:
            raise ValueError(
                f"In tuner with method={method!r}, `dataloaders` argument should be None, please consider setting "
                "`train_dataloaders` and `val_dataloaders` instead."
            )
        if method != "fit" and any(value is not None for value in trains.values()):
            raise ValueError(
                f"In tuner with `method`={method!r}, `train_dataloaders` and `val_dataloaders` arguments should be "
                "None, please consider setting `dataloaders` instead."
            )
        for callback in self._trainer.callbacks:
            if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
                raise ValueError(
                    f"Trainer is already configured with a `{type(callback).__name__}` callback. Please remove it if "
                    "you want to use the Tuner."
                )
        given = trains if method == "fit" else {method: others}
        return self._trainer.call_in_run(search, model, given, datamodule, method)
