"""Averages of a module's weights over the steps of a training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import (
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from .arguments import is_number, require, require_int
from .base import Callback
from .intervals import steps_of
from .weight_set import Average, WeightSet

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class KeepsAverage(Callback):
    """What callbacks have in common that keep an average of the weights.

    Args:
        weights: the average.
        function: averages.
    """

    def __init__(self, weights: WeightSet, function: Average) -> None:
        self.weight_set = weights
        self._function = function
        # The last epoch at which it was updated.
        self._latest_update_epoch = -1

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.weight_set.name}]"

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.weight_set.begin(pl_module, trainer.strategy)
        if trainer.global_step == 0:
            self._latest_update_epoch = -1

    def _update(self, trainer: Trainer, module: Module) -> None:
        self.weight_set.update(module, trainer.strategy, self._function)

    def state_dict(self) -> dict[str, Any]:
        return {
            "latest_update_epoch": self._latest_update_epoch,
            "n_averaged": self.weight_set.num_updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning saves neither.
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)
        self.weight_set.count_from(state_dict.get("n_averaged", 0))


class WeightAveraging(KeepsAverage):
    """Keeps an average of the weights beside those that are trained; override :meth:`should_update` to say of which.

    Checkpoints hold it beside the weights, and a run that resumes goes on with both. Validation, test and prediction
    run on it, or on that of a checkpoint if they are given one; before the first update there is none, and they run on
    the module's weights. After the training the module has it. A further ``fit`` goes on with the weights that were
    trained, and a checkpoint that is saved after a fit holds both, too.

    ``Module.load_from_checkpoint(path, weight_set="average")``, ``Trainer.export(path, weight_set="average")`` and
    ``python -m loopwright.framework.export CHECKPOINT FILE --weight-set average`` take the average.

    Where parameters are sharded over processes, each one averages its shards.

    Args:
        device: where to keep the average. Default: where the weights are.
        use_buffers: average buffers as the parameters; otherwise they are those of the module at the last update.
        avg_fn: as of ``torch.optim.swa_utils.AveragedModel``: returns the new average, given it, the weights and the
            number of updates before, each a tensor. Default: all updates weigh the same.
        multi_avg_fn: the same for lists of tensors, which it changes.
        evaluate: run validation, test and prediction on the average.
        name: of the average in checkpoints. Callbacks of one class need different ones.

    Raises:
        ValueError: if ``avg_fn`` and ``multi_avg_fn`` are both given, or ``name`` is no word.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        *,
        avg_fn: Any = None,
        multi_avg_fn: Any = None,
        evaluate: bool = True,
        name: str = "average",
    ) -> None:
        weights = WeightSet(name, device, use_buffers, evaluate)
        super().__init__(weights, average_by(avg_fn, multi_avg_fn))
        # The number of steps at the last update.
        self._latest_update_step = 0

    def should_update(
        self, step_idx: int | None = None, epoch_idx: int | None = None
    ) -> bool:
        """Whether to update the average now; one of the arguments is given.

        Args:
            step_idx: index of the optimizer step that was just taken.
            epoch_idx: index of the epoch that has just ended.
        """
        return step_idx is not None

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._latest_update_step = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(trainer, pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        is_next = epoch > self._latest_update_epoch
        if is_next and self.should_update(epoch_idx=epoch):
            self._update(trainer, pl_module)
            self._latest_update_epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        step = self._latest_update_step
        return {"latest_update_step": step, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._latest_update_step = state_dict["latest_update_step"]


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average of the weights: ``decay * average + (1 - decay) * weights`` at each update.

    It is a :class:`WeightAveraging`, called ``"ema"`` in checkpoints. Its arguments are Lightning's.

    Args:
        device: where to keep the average. Default: where the weights are.
        use_buffers: average buffers as the parameters; otherwise they are those of the module at the last update.
        decay: from 0 to 1; about ``1 / (1 - decay)`` updates count.
        update_every_n_steps: update after so many optimizer steps, those whose index is a multiple of it.
        update_starting_at_step: index of the first optimizer step after which to update. Default: all.
        update_starting_at_epoch: from this epoch on, update after each epoch, too. Default: never.
        update_every: instead of ``update_every_n_steps``, the same as text: ``"10 steps"``.
        **kwargs: as of :class:`WeightAveraging`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        update_every: str | None = None,
        **kwargs: Any,
    ) -> None:
        update_every_n_steps = steps_of(
            "update_every", update_every, update_every_n_steps
        )
        is_decay = is_number(decay) and 0 <= decay <= 1
        require(is_decay, "decay", "a number from 0 to 1", decay)
        require_int("update_every_n_steps", update_every_n_steps, 1)
        for name, first in (
            ("update_starting_at_step", update_starting_at_step),
            ("update_starting_at_epoch", update_starting_at_epoch),
        ):
            if first is not None:
                require_int(name, first, 0)
        ema = partial(_average_exponentially, decay)
        kwargs = {"name": "ema", "multi_avg_fn": ema, **kwargs}
        super().__init__(device, use_buffers, **kwargs)
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(
        self, step_idx: int | None = None, epoch_idx: int | None = None
    ) -> bool:
        if step_idx is not None:
            first = self.update_starting_at_step or 0
            return step_idx >= first and step_idx % self.update_every_n_steps == 0
        first = self.update_starting_at_epoch
        return first is not None and epoch_idx is not None and epoch_idx >= first


def average_by(avg_fn: Any, multi_avg_fn: Any = None) -> Average:
    """What averages lists of tensors by one of torch's two kinds of functions.

    Args:
        avg_fn: returns an average, given it, the weights and the number of updates before.
        multi_avg_fn: changes a list of averages.

    Raises:
        ValueError: if both are given.
    """
    if avg_fn is not None and multi_avg_fn is not None:
        raise ValueError("avg_fn and multi_avg_fn cannot both be given")
    if multi_avg_fn is not None:
        return partial(_average_lists, multi_avg_fn)
    return _average_equally if avg_fn is None else partial(_average_each, avg_fn)


def _average_exponentially(
    decay: float, own: list[Tensor], others: list[Tensor], updates: Any
) -> None:
    """Average as torch does. Unlike torch's function, which is made inside another one, this one can be pickled."""
    get_ema_multi_avg_fn(decay)(own, others, updates)


def _average_lists(
    function: Any, own: list[Tensor], others: list[Tensor], updates: int
) -> None:
    """Average by a function of lists, which changes the first one."""
    function(own, others, torch.tensor(updates, device=own[0].device))


def _average_each(
    function: Any, own: list[Tensor], others: list[Tensor], updates: int
) -> None:
    """Average by a function that returns each average."""
    number = torch.tensor(updates, device=own[0].device)
    for average, weights in zip(own, others, strict=True):
        average.copy_(function(average, weights, number))


def _average_equally(own: list[Tensor], others: list[Tensor], updates: int) -> None:
    """Average so that all updates weigh the same."""
    # torch's function of lists takes whole numbers on some devices only.
    if own[0].is_floating_point() or own[0].is_complex():
        get_swa_multi_avg_fn()(own, others, updates)
        return
    average_one = get_swa_avg_fn()
    for average, weights in zip(own, others, strict=True):
        average.copy_(average_one(average, weights, updates))
