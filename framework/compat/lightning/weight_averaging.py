"""Lightning's callbacks that average weights: its attributes and its keys in checkpoints, over those of Loopwright."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ....callbacks import EMAWeightAveraging as NativeEMAWeightAveraging
from ....callbacks import WeightAveraging as NativeWeightAveraging
from ....callbacks.weight_set import WeightSet


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
