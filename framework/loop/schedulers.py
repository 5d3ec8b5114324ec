"""When the schedulers of a fit step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..module import Module
from ..subclasses import overrides
from .optimizers import LRSchedulerConfig, parse_optimizers

if TYPE_CHECKING:
    from .run import Run


class Schedulers:
    """The schedulers of a fit; in manual optimization the module steps them itself.

    Args:
        run: the fit.
        configs: the schedulers, and when each steps.

    Attributes:
        configs: as given.
        each_step: those that step after each window.
        each_step_on_value: those of them that monitor a value.
    """

    def __init__(self, run: Run, configs: list[LRSchedulerConfig]) -> None:
        self.run = run
        self._hook = None
        if overrides(run.module, "lr_scheduler_step", Module):
            self._hook = run.module.lr_scheduler_step
        self._use(configs)

    def use(self, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """Step these from now on, and no longer those that were.

        Args:
            optimizers: those of the fit.
            schedulers: each a scheduler, or what ``configure_optimizers`` may return for one.
        """
        _, configs = parse_optimizers((optimizers, schedulers))
        self._use(configs)

    def _use(self, configs: list[LRSchedulerConfig]) -> None:
        self.configs = configs
        stepped = configs if self.run.module.automatic_optimization else []
        by_step = [config for config in stepped if config.interval == "step"]
        self.each_step = [c for c in by_step if not c.reduce_on_plateau]
        self.each_step_on_value = [c for c in by_step if c.reduce_on_plateau]
        self._each_epoch = [c for c in stepped if c.interval == "epoch"]

    def step_after_window(self) -> None:
        """Step those that step by windows, unless the optimizer's step was skipped; those that monitor a value wait."""
        for config in self.each_step:
            is_due = self.run.state.global_step % config.frequency == 0
            if is_due and not self.run.engine.step_was_skipped:
                self._step(config, None)

    def step_after_batches(self) -> None:
        """Step those that step by epochs, at an epoch's last batch; those that monitor a value wait for its end."""
        for config in self._each_epoch:
            if not config.reduce_on_plateau and self._is_due_in_epoch(config):
                self._step(config, None)

    def step_on_epoch_values(self) -> None:
        """Step, at the very end of an epoch, those that monitor a value."""
        for config in self._each_epoch:
            if config.reduce_on_plateau and self._is_due_in_epoch(config):
                self._step_on_value(config)

    def wait_for_value(self) -> None:
        """Let those that monitor a value by steps wait for the validation that follows the window, if one does."""
        if self.each_step_on_value:
            self.run.state.wait_for_validation()

    def step_on_waiting_values(self) -> None:
        """Step those that monitor a value by steps, if they have not done so since the last window."""
        state = self.run.state
        if not state.plateau_waits:
            return
        state.end_waiting()
        for config in self.each_step_on_value:
            if state.global_step % config.frequency == 0:
                self._step_on_value(config)

    def _is_due_in_epoch(self, config: LRSchedulerConfig) -> bool:
        return (self.run.state.epoch + 1) % config.frequency == 0

    def _step_on_value(self, config: LRSchedulerConfig) -> None:
        logged = self.run.trainer.callback_metrics
        assert config.monitor is not None
        # A step's value is each rank's own, and all have to step alike: they take the main one's.
        value = self.run.engine.broadcast(logged.get(config.monitor))  # collective
        if value is not None:
            self._step(config, value)
            return
        what = f"{type(config.scheduler).__name__} monitors {config.monitor!r}, which was not logged"
        if config.strict:
            raise RuntimeError(
                f"{what} by the time it steps; logged were: {', '.join(sorted(logged)) or 'none'}. Log it, name "
                'another, raise the scheduler\'s "frequency", or set "strict": False'
            )
        self.run.warn_once(f"{what}: it does not step")

    def _step(self, config: LRSchedulerConfig, value: Any) -> None:
        if self._hook is not None:
            self._hook(config.scheduler, value)
        elif value is None:
            config.scheduler.step()
        else:
            config.scheduler.step(value)
