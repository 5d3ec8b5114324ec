"""Lightning's callbacks that average weights: its attributes and its keys in checkpoints, over those of Loopwright."""

from __future__ import annotations

import warnings
from copy import deepcopy
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from ....callbacks import EMAWeightAveraging as NativeEMAWeightAveraging
from ....callbacks import StochasticWeightAveraging as NativeStochastic
from ....callbacks import WeightAveraging as NativeWeightAveraging
from ....callbacks.weight_set import WeightSet
from .utilities import MisconfigurationException

log = getLogger("loopwright")


class AverageModel:
    """What programs read of Lightning's ``_average_model``.

    Args:
        weight_set: the average.
        module: what is trained.
    """

    def __init__(self, weight_set: WeightSet, module: nn.Module) -> None:
        self._weight_set = weight_set
        self._trained = module
        self._copy: nn.Module | None = None

    @property
    def n_averaged(self) -> Tensor:
        """How many updates the average has had."""
        return torch.tensor(self._weight_set.num_updates)

    @property
    def module(self) -> nn.Module:
        """A copy of the module with the average; with the module's weights of then, before the first update."""
        if self._copy is None:
            self._copy = deepcopy(self._trained)
            vars(self._copy)["_trainer"] = None
        self._copy.load_state_dict(self._weight_set.tensors, strict=False)
        return self._copy


class WeightAveraging(NativeWeightAveraging):
    """A :class:`~loopwright.callbacks.WeightAveraging` that saves under Lightning's keys.

    In its checkpoints ``state_dict`` is the average, ``current_model_state`` what is trained, and ``averaging_state``
    has the number of updates.

    Args:
        device: as of the native one.
        use_buffers: as of the native one.
        **kwargs: as of the native one.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(device, use_buffers, **kwargs)
        self._average_model: AverageModel | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._average_model = AverageModel(self.weight_set, pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: Any) -> None:
        """Lightning's name for the moments when the average gets into the module, or out; that is done elsewhere."""

    def _copy_average_to_current(self, pl_module: Any) -> None:
        """Lightning's name for the moment when the module gets the average for good; that is done after the fit."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        sets = checkpoint.get("weight_sets", {})
        average = sets.pop(self.weight_set.name, None)
        if not sets:
            checkpoint.pop("weight_sets", None)
        if average is not None:
            own = checkpoint["state_dict"]
            checkpoint["current_model_state"] = own
            checkpoint["state_dict"] = {**own, **average}
            updates = torch.tensor(self.weight_set.num_updates)
            checkpoint["averaging_state"] = {"n_averaged": updates}


class EMAWeightAveraging(WeightAveraging, NativeEMAWeightAveraging):
    """A :class:`~loopwright.callbacks.EMAWeightAveraging` that saves under Lightning's keys.

    Args:
        *args: as of the native one.
        **kwargs: as of the native one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        NativeEMAWeightAveraging.__init__(self, *args, **kwargs)
        self._average_model = None


class StochasticWeightAveraging(NativeStochastic):
    """A :class:`~loopwright.callbacks.StochasticWeightAveraging` with Lightning's attributes.

    Args:
        swa_lrs: as of the native one.
        swa_epoch_start: as of the native one.
        annealing_epochs: as of the native one.
        annealing_strategy: as of the native one.
        avg_fn: as of the native one.
        **kwargs: as of the native one.

    Raises:
        MisconfigurationException: if an argument is out of its range.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        rest = (annealing_epochs, annealing_strategy, avg_fn, *args)
        try:
            super().__init__(swa_lrs, swa_epoch_start, *rest, **kwargs)
        except ValueError as error:
            # Programs look for these words.
            words = str(error).replace("an int of at least 1,", "a >0 integer")
            words = words.replace("from 0 to", "between 0 and")
            raise MisconfigurationException(words) from None
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn
        self._of_module: AverageModel | None = None
        self._swa_scheduler: Any = None

    @property
    def n_averaged(self) -> Tensor:
        """How many updates the average has had."""
        return torch.tensor(self.weight_set.num_updates)

    @property
    def _average_model(self) -> nn.Module | None:
        return None if self._of_module is None else self._of_module.module

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._of_module = AverageModel(self.weight_set, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            super().on_fit_start(trainer, pl_module)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    def _anneal(self, trainer: Any) -> None:
        super()._anneal(trainer)
        self._swa_scheduler = trainer.lr_scheduler_configs[0].scheduler

    def _tell_of_replaced(self, configs: list[Any]) -> None:
        for config in configs:
            if config.interval != "epoch" or config.frequency != 1:
                warnings.warn(
                    f"SWA is currently only supported every epoch. Found {config}",
                    stacklevel=2,
                )
            name = type(config.scheduler).__name__
            log.info("Swapping scheduler `%s` for `SWALR`", name)

    def _update(self, trainer: Any, module: Any) -> None:
        self.update_parameters(None, module, self.n_averaged, self._avg_fn)
        super()._update(trainer, module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if self.weight_set.tensors:
            self.transfer_weights(None, pl_module)

    @staticmethod
    def update_parameters(*args: Any) -> None:
        """Lightning's name for the moment when the average is updated; that is done elsewhere."""

    @staticmethod
    def transfer_weights(*args: Any) -> None:
        """Lightning's name for the moment when the module gets the average; that is done after the fit."""
