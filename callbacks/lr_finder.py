"""Find a learning rate, by a short training in which it rises."""

from __future__ import annotations

import math
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch

from .arguments import is_number, require, require_choice, require_int
from .base import Callback
from .tuned_attributes import find_attribute, set_attribute

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

# What the learning rate is called where the user does not say.
_NAMES = ("lr", "learning_rate")
# How much of the losses' running mean stays at each step.
_SMOOTHING = 0.98


class LearningRateResult:
    """What a :class:`LearningRateFinder` has found.

    Args:
        mode: how the rate has risen: ``"exponential"`` or ``"linear"``.
        lr_min: from which rate.
        lr_max: to which.
        num_training: in how many steps.

    Attributes:
        results: ``"lr"``, the rates, and ``"loss"``, the smoothed losses, each a list by step.
    """

    def __init__(
        self, mode: str, lr_min: float, lr_max: float, num_training: int
    ) -> None:
        self.mode = mode
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.num_training = num_training
        self.results: dict[str, Any] = {}
        self._optimal_idx: int | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step == 0:
            return self.lr_min
        progress = (step + 1) / self.num_training
        if self.mode == "linear":
            return self.lr_min + progress * (self.lr_max - self.lr_min)
        return self.lr_min * (self.lr_max / self.lr_min) ** progress

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss falls fastest; None if there are too few losses to tell.

        Args:
            skip_begin: how many steps to leave out at the beginning.
            skip_end: how many at the end.
        """
        self._optimal_idx = None
        rates = self.results["lr"]
        losses = self.results["loss"]
        steps = [
            step
            for step in range(skip_begin, len(losses) - skip_end)
            if math.isfinite(losses[step])
        ]
        if len(steps) < 2:
            log.error(
                "Failed to compute suggestion for learning rate, as there are too few losses (%d of %d count, the "
                "first %d and the last %d are left out): take more steps",
                len(steps),
                len(losses),
                skip_begin,
                skip_end,
            )
            return None
        spacing = torch.tensor([rates[step] for step in steps])
        slopes = torch.gradient(
            torch.tensor([losses[step] for step in steps]), spacing=[spacing]
        )[0]
        self._optimal_idx = steps[int(slopes.argmin())]
        return rates[self._optimal_idx]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw the loss over the rate, with matplotlib.

        Args:
            suggest: mark the suggestion.
            show: show the figure.
            ax: matplotlib axes to draw into (default: those of a new figure).

        Returns:
            The figure.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib: pip install matplotlib"
            ) from error
        if ax is None:
            _, ax = pyplot.subplots()
        rates = self.results["lr"]
        losses = self.results["loss"]
        ax.plot(rates, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and self.suggestion() is not None:
            assert self._optimal_idx is not None
            at = self._optimal_idx
            ax.plot(rates[at], losses[at], markersize=10, marker="o", color="red")
        if show:
            pyplot.show()
        return ax.figure


class LearningRateFinder(Callback):
    """Looks for a learning rate when a fit begins: takes some steps with a rising rate, and undoes them.

    The loss of each step is smoothed; the rate at which it falls fastest is the suggestion. The module's ``lr`` or
    ``learning_rate`` is set to it, or that of its data module or of the hyperparameters, and ``configure_optimizers``
    is called again. So the fit is, to the last bit, the one that would have had this rate from the beginning. A fit
    that goes on, such as from a checkpoint, keeps what was found.

    With several processes, the main process's losses count for all. To look at other moments, override
    :meth:`on_fit_start` and call :meth:`lr_find`, such as in ``on_train_epoch_start``; the optimizer then gets the rate
    as it is, and schedulers go on from it.

    Args:
        min_lr: where to begin.
        max_lr: where to end.
        num_training_steps: optimizer steps from one to the other.
        mode: ``"exponential"`` or ``"linear"``: how the rate rises.
        early_stop_threshold: end when the loss is this many times the best one; None for never.
        update_attr: set the module's learning rate to the suggestion.
        attr_name: its name, where it is another one.

    Attributes:
        optimal_lr: a :class:`LearningRateResult`; None before the search.

    Raises:
        ValueError: for arguments that are not as described; in a fit, if there are several optimizers.
        AttributeError: if there is no such attribute to set.
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        mode = str(mode).lower()
        require_choice("mode", mode, "exponential", "linear")
        require_int("num_training_steps", num_training_steps, 1)
        require(is_number(max_lr), "max_lr", "a number", max_lr)
        is_below = is_number(min_lr) and 0 < min_lr < max_lr
        require(is_below, "min_lr", "a number between 0 and max_lr", min_lr)
        ends_early = is_number(early_stop_threshold) or early_stop_threshold is None
        require(
            ends_early, "early_stop_threshold", "a number or None", early_stop_threshold
        )
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.num_training_steps = num_training_steps
        self.mode = mode
        self.early_stop_threshold = early_stop_threshold
        self.update_attr = update_attr
        self.attr_name = attr_name
        self.optimal_lr: LearningRateResult | None = None
        self._goes_on = False

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._goes_on or trainer.global_step:
            log.info("LearningRateFinder: a fit that goes on keeps its learning rate")
        else:
            self.lr_find(trainer, pl_module)
        self._goes_on = False

    def lr_find(self, trainer: Trainer, pl_module: Module) -> LearningRateResult | None:
        """Look for a learning rate, in a hook before an epoch's first batch.

        Args:
            trainer: the Trainer that runs.
            pl_module: its module.

        Returns:
            What was found; None under ``fast_dev_run``, which looks for nothing.

        Raises:
            ValueError: if there are several optimizers.
            AttributeError: if there is no learning rate to set.
        """
        if trainer.fast_dev_run:
            log.warning("fast_dev_run: no learning rate is looked for")
            return None
        name = self._name_in(trainer, pl_module) if self.update_attr else ""
        optimizers = trainer.optimizers
        if len(optimizers) != 1:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise ValueError(
                f"the learning rate finder only works with single optimizer; there are {len(optimizers)} ({kinds}): "
                "set their rates by hand"
            )
        found = self._result()
        sweep = _Sweep(found, self.early_stop_threshold)
        trainer.rehearse(self.num_training_steps, [sweep])
        found.results = {"lr": sweep.rates, "loss": sweep.losses}
        self.optimal_lr = found
        if sweep.has_diverged:
            log.info(
                "LR finder stopped early after %d steps due to diverging loss.",
                len(sweep.losses),
            )
        if self.update_attr:
            self._use(trainer, pl_module, name, found.suggestion())
        return found

    def _name_in(self, trainer: Trainer, module: Module) -> str:
        """What the learning rate is called.

        Raises:
            AttributeError: if nobody has such an attribute.
        """
        if name := find_attribute(
            trainer, module, (self.attr_name,) if self.attr_name else _NAMES
        ):
            return name
        if self.attr_name:
            raise AttributeError(
                f"The attribute name for the learning rate was set to {self.attr_name}, but could not find this as a "
                "field in `model` or `model.hparams`."
            )
        raise AttributeError(
            "When using the learning rate finder, either `model` or `model.hparams` should have one of these fields: "
            f"{_NAMES}. If it has another name, set it with attr_name=…; or look only, with update_attr=False"
        )

    def _use(
        self, trainer: Trainer, module: Module, name: str, rate: float | None
    ) -> None:
        """Train with a rate from now on."""
        if rate is None:
            return
        set_attribute(trainer, module, name, rate)
        if trainer.global_step == 0:
            trainer.reconfigure_optimizers()
        else:
            for group in trainer.optimizers[0].param_groups:
                _set_rate(group, rate)
                group["initial_lr"] = rate
            for config in trainer.lr_scheduler_configs:
                base_rates = getattr(config.scheduler, "base_lrs", [])
                base_rates[:] = [rate] * len(base_rates)
        log.info("Learning rate set to %s", rate)

    # State.

    def state_dict(self) -> dict[str, Any]:
        found = self.optimal_lr
        return {} if found is None else {"results": found.results}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        # Before configure_optimizers, which so has the rate that was found.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state or trainer.state.fn != "fit":
            return
        self._goes_on = True
        self.optimal_lr = found = self._result()
        found.results = state["results"]
        if self.update_attr and (rate := found.suggestion()) is not None:
            set_attribute(trainer, pl_module, self._name_in(trainer, pl_module), rate)

    def _result(self) -> LearningRateResult:
        return LearningRateResult(
            self.mode, self.min_lr, self.max_lr, self.num_training_steps
        )


class _Sweep(Callback):
    """Raises the learning rate from step to step, and notes the losses.

    Args:
        plan: says how.
        threshold: end when a loss is this many times the best one.
    """

    def __init__(self, plan: LearningRateResult, threshold: float | None) -> None:
        self.plan = plan
        self.threshold = threshold
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.has_diverged = False
        self._mean = 0.0
        self._best = math.inf

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int
    ) -> None:
        rate = self.plan.rate_at(len(self.losses))
        for group in trainer.optimizers[0].param_groups:
            _set_rate(group, rate)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.window_is_open or not outputs:
            return
        step = len(self.losses) + 1
        # Reading it waits for the device.
        loss = trainer.strategy.broadcast(float(outputs["loss"]))  # collective
        self.rates.append(self.plan.rate_at(step - 1))
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        smoothed = self._mean / (1 - _SMOOTHING ** (step + 1))
        self.losses.append(smoothed)
        self.has_diverged = (
            step > 1
            and self.threshold is not None
            and smoothed > self.threshold * self._best
        )
        if self.has_diverged:
            trainer.should_stop = True
        if smoothed < self._best or step == 1:
            self._best = smoothed


def _set_rate(group: dict[str, Any], rate: float) -> None:
    # It is a tensor in optimizers that are compiled, or captured in a graph.
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
