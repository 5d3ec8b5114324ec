"""Log the learning rates."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from .arguments import require_choice
from .base import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..framework import Module, Trainer


class LearningRateMonitor(Callback):
    """Log the learning rate of each optimizer, and on request its momentum and weight decay.

    A row with step *n* has the rates that step *n* was taken with, as it has that step's loss.

    Values are called ``lr-`` and the optimizer's class, as in ``lr-SGD``; a second one of that class is ``lr-SGD-1``.
    A scheduler's ``name`` (from ``configure_optimizers``) takes the place of that. If there are several parameter
    groups, ``/pg1``, ``/pg2``, … follow, or the ``name`` that a group has.
    They are in ``trainer.callback_metrics`` too, where :class:`~.early_stopping.EarlyStopping` finds them.

    Args:
        logging_interval: ``"step"`` logs every ``log_every_n_steps`` steps of the Trainer, ``"epoch"`` at the start of
            each epoch; None takes each scheduler's own interval, and both for an optimizer without scheduler.
        log_momentum: also log ``…-momentum``: the momentum, or the first beta.
        log_weight_decay: also log ``…-weight_decay``.

    Attributes:
        lrs: the learning rates logged so far, by name.

    Raises:
        ValueError: if ``logging_interval`` is none of these, or two groups of one optimizer have the same name.
        RuntimeError: when training starts, if the Trainer has no logger.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        require_choice("logging_interval", logging_interval, "step", "epoch", None)
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        # Optimizer steps from one row to the next; 0 for none.
        self._every_n_steps = 0
        self._logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.loggers and not trainer.fast_dev_run:
            raise RuntimeError(
                "LearningRateMonitor needs a logger: Trainer(logger=...) must not be False"
            )
        per_step = self.logging_interval != "epoch"
        self._every_n_steps = trainer.log_every_n_steps if per_step else 0
        self._logged_step = trainer.global_step

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Module,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # The step that this batch belongs to; an accumulation window has several batches.
        step = trainer.global_step + 1
        every = self._every_n_steps
        if not every or step % every or step == self._logged_step:
            return
        self._logged_step = step
        self._log(trainer, "step", step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch", trainer.global_step)

    def _log(self, trainer: Trainer, interval: str, step: int) -> None:
        rates: dict[str, float] = {}
        others: dict[str, float] = {}
        for name, optimizer, own_interval in optimizers_by_name(trainer):
            if self.logging_interval is None and own_interval not in (None, interval):
                continue
            for key, group in groups_by_name(name, optimizer):
                rates[key] = float(group["lr"])
                if self.log_momentum:
                    momentum = group.get("momentum", 0.0)
                    first_beta, *_ = group.get("betas", (momentum,))
                    others[f"{key}-momentum"] = float(first_beta)
                if self.log_weight_decay:
                    decay = group.get("weight_decay", 0.0)
                    others[f"{key}-weight_decay"] = float(decay)
        if not rates:
            return
        for key, rate in rates.items():
            self.lrs.setdefault(key, []).append(rate)
        trainer.metrics.publish({**rates, **others})
        trainer.log_row({"epoch": trainer.current_epoch, **rates, **others}, step)


def optimizers_by_name(trainer: Trainer) -> list[tuple[str, Optimizer, str | None]]:
    """The optimizers of schedulers, then those without: name, optimizer, and the scheduler's interval or None."""
    listed: list[tuple[str | None, Optimizer, str | None]] = [
        (config.name, config.scheduler.optimizer, config.interval)
        for config in trainer.lr_scheduler_configs
    ]
    for wrapped in trainer.optimizers:
        # DeepSpeed's and manual optimization's are wrapped.
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if all(optimizer is not other for _, other, _ in listed):
            listed.append((None, optimizer, None))
    counts: Counter[str] = Counter()
    named = []
    for given_name, optimizer, interval in listed:
        name = given_name or f"lr-{type(optimizer).__name__}"
        number = counts[name]
        counts[name] += 1
        named.append((f"{name}-{number}" if number else name, optimizer, interval))
    return named


def groups_by_name(
    name: str,
    optimizer: Optimizer,
) -> list[tuple[str, dict[str, Any]]]:
    """The parameter groups of an optimizer of that name, and what their learning rates are called.

    Raises:
        ValueError: if two of them have the same name.
    """
    groups = optimizer.param_groups
    if len(groups) == 1 and not groups[0].get("name"):
        return [(name, groups[0])]
    names = [group.get("name", f"pg{i}") for i, group in enumerate(groups, start=1)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the parameter groups of one optimizer need different names; {name} has {names}"
        )
    return [(f"{name}/{key}", group) for key, group in zip(names, groups, strict=True)]
