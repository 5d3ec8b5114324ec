"""What trains on a batch: what automatic and manual optimization have in common."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ...strategies.optimizer_state import parameters_of
from ..checkpoint.serialization import fill_unloaded
from ..engine.step_errors import explain_step
from ..messages import log
from ..module import Module
from ..subclasses import overrides
from .optimizers import LRSchedulerConfig, ManualOptimizer
from .schedule_free import ScheduleFree
from .schedulers import Schedulers

if TYPE_CHECKING:
    from ..data.iteration import LookAhead
    from .run import Run


class Step(ABC):
    """Trains on a batch with the optimizers of one ``fit``; :class:`~.automatic.AutomaticStep` or ``ManualStep``.

    Args:
        run: the fit.
        optimizers: as the strategy gave them.
        schedulers: the schedulers, and when each steps.
        kinds: names of the optimizers' classes as the user knows them, then of the schedulers'.

    Attributes:
        optimizers: as given.
        manual: the same, as the module gets them.
        schedulers: the schedulers.
        schedule_free: what changes the weights for evaluation, if the optimizers do so.
        accumulation: the window of micro-batches.
        configured: what ``configure_optimizers`` asked for, before anything was trained or loaded.
        stepped: whether the last batch completed a window.
        leaves_out: whether a batch has been left out by its weight, or as None.
        has_ranks: whether there are several ranks.
        call_step: calls ``training_step`` with a batch and its index.
        wants_outputs: whether somebody looks at what the step returns.
    """

    def __init__(
        self,
        run: Run,
        optimizers: list[Optimizer],
        schedulers: list[LRSchedulerConfig],
        kinds: list[str],
    ) -> None:
        module = run.module
        trainer = run.trainer
        self.run = run
        self.engine = run.engine
        self.state = run.state
        self._use(optimizers)
        self.schedulers = Schedulers(run, schedulers)
        self.accumulation = run.engine.accumulation
        self.accumulation.count_in(run.state)
        self.accumulation.over(trainer.accumulate_grad_batches)
        self.stepped = False
        self.leaves_out = False
        groups = [self.engine.optimizer_state(o)["param_groups"] for o in optimizers]
        self.configured = repr(groups)
        self._kinds = kinds
        self._toggled: list[tuple[Tensor, bool]] = []
        self.has_ranks = run.engine.num_processes > 1
        self.call_step = _caller_of(run)
        self.wants_outputs = bool(run.hooks.on_train_batch_end)
        # None for what the module does not override, which is done without calling it.
        self._backward = override_of(module, "backward")
        self._zero_grad = override_of(module, "optimizer_zero_grad")
        self._clip = override_of(module, "configure_gradient_clipping")
        self._clips_each = self._clip is not None
        if self._clip is None and trainer.gradient_clip_val:
            self._clip = module.configure_gradient_clipping

    @property
    def overrides_a_part(self) -> bool:
        """Whether the module, or gradient clipping, takes the place of a part of the step."""
        return any((self._backward, self._zero_grad, self._clip))

    @property
    def train_on(self) -> Callable[[Any, int], dict[str, Any] | None]:
        """What the loop calls with a batch and its index: this step, or a shorter one if that does the same."""
        return self

    @abstractmethod
    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch.

        Args:
            batch: the batch, on the device.
            batch_idx: its index in the epoch.

        Returns:
            What callbacks get of the step's output, without its graph; None if the batch was left out.
        """

    def leave_out(self, batch_idx: int) -> None:
        """Go on past a batch that is None: the run leaves it out, or a ``collate_fn`` has returned that.

        Its window may end with it.

        Raises:
            RuntimeError: if the loader gave it with several ranks, where the others wait for its gradients.
        """
        if batch_idx not in self.run.loaders.left_out():
            self._note_missing_batch(batch_idx)
        self.leaves_out = True
        self.accumulation.begin(batch_idx, self.run.schedule.length - batch_idx)
        self.stepped = False
        if self.accumulation.is_last and self.window_is_open:
            self.end_window_early(batch_idx)

    def _note_missing_batch(self, batch_idx: int) -> None:
        """Say that the loader gave None; raise with several ranks."""
        if self.has_ranks:
            raise RuntimeError(
                f"the training loader gave None on rank {self.engine.process_index}, batch {batch_idx}: with several "
                "processes each trains on each batch, as the others wait for its gradients"
            )
        self.run.warn_once(
            "The training loader gave None, and such batches are left out (epoch %d, batch %d)",
            self.state.epoch,
            batch_idx,
        )

    def abandon(self) -> None:
        """Forget the open window and its gradients, as the run goes back to where these were not there."""
        self.untoggle()
        for manual in self.manual:
            manual.begin_window()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.engine.end_window()
        self.accumulation.abandon()
        self.stepped = False

    def replace_schedulers(self, schedulers: list[Any]) -> None:
        """Step these from now on, each a scheduler or what ``configure_optimizers`` may return for one."""
        self.schedulers.use(self.optimizers, schedulers)

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Step these from now on."""
        self._use(optimizers)
        self.schedule_free.train()

    def _use(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        wrap = self.run.trainer.manual_optimizer
        self.manual = [wrap(optimizer, self) for optimizer in optimizers]
        self.schedule_free = ScheduleFree(self.run, optimizers)

    # Windows.

    def begin_epoch(self) -> None:
        """Let the next batch begin a window, of as many batches as the Trainer says."""
        self.accumulation.over(self.run.trainer.accumulate_grad_batches)
        self.accumulation.abandon()

    def change_accumulation(self) -> None:
        """Take the Trainer's new number of batches, from the next window on."""
        self.accumulation.over(self.run.trainer.accumulate_grad_batches)

    def ends_inside_window(self, batches: LookAhead) -> bool:
        """Whether the epoch ends with the next batch, though it does not complete its window.

        A batch is read ahead only inside a window. At a window's end, where checkpoints are saved, the loader must not
        have given more than was trained on.
        """
        return self.accumulation.goes_on(self.state.batch_idx) and batches.at_end

    @property
    def window_is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return self.accumulation.count > 0

    def end_window_early(self, batch_idx: int) -> None:
        """Step on what was gathered until batch ``batch_idx``: the epoch ended sooner than planned."""
        if self.has_ranks and self.run.trainer.micro_batch is None:
            # The backward of a window's last batch averages gradients over the ranks, and there was none.
            for optimizer in self.optimizers:
                self.engine.sync_gradients_of(optimizer)
        self.stepped = self.end_window(batch_idx)
        self.accumulation.abandon()

    @abstractmethod
    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step an optimizer, for :class:`~.optimizers.ManualOptimizer`."""

    @abstractmethod
    def update(self, optimizer: ManualOptimizer, loss: Tensor) -> None:
        """Do what ``optimizer.update(loss)`` asks for, for :class:`~.optimizers.ManualOptimizer`."""

    @abstractmethod
    def end_window(self, batch_idx: int) -> bool:
        """Step on what the window has gathered, be it fewer batches than planned; False if it has gathered nothing."""

    # The parts of a step.

    def zero_grad(self, optimizer: Optimizer, batch_idx: int) -> None:
        """Clear the gradients of the last window."""
        for hook in self.run.hooks.on_before_zero_grad:
            hook(optimizer)
        if self._zero_grad is not None:
            self._zero_grad(self.state.epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, between the hooks for it.

        Args:
            loss: a scalar.
            *args: for ``Tensor.backward``.
            **kwargs: for ``Tensor.backward``.

        Raises:
            RuntimeError: if the loss is not finite, with ``detect_anomaly``.
        """
        if self.run.trainer.detect_anomaly:
            self._require_finite(loss)
        for hook in self.run.hooks.on_before_backward:
            hook(loss)
        try:
            self.engine.compute_gradients(loss, *args, run=self._backward, **kwargs)
        except Exception as error:
            explain_step(error, loss)
            raise
        for hook in self.run.hooks.on_after_backward:
            hook()

    def _require_finite(self, loss: Tensor) -> None:
        # A host–device sync, asked for by detect_anomaly.
        if not bool(torch.isfinite(loss).all()):
            raise RuntimeError(
                f"the loss is {loss.item()} at {self.state.where}: look at this batch and at what the step computes "
                "(detect_anomaly=True)"
            )

    def prepare_step(self, *optimizers: Optimizer) -> None:
        """Call the hooks before optimizers step, and clip their gradients, which are those of the step.

        Args:
            *optimizers: those that step now. Their gradients are clipped together, as those of a single one would be;
                the module's own ``configure_gradient_clipping`` is called for each.
        """
        for optimizer in optimizers:
            for hook in self.run.hooks.on_before_optimizer_step:
                hook(optimizer)
        if self._clip is None:
            return
        trainer = self.run.trainer
        value = trainer.gradient_clip_val
        algorithm = trainer.gradient_clip_algorithm
        if value and len(optimizers) > 1 and not self._clips_each:
            parameters = self._in_order_of_module(optimizers)
            self.engine.clip_together(parameters, value, algorithm)
            return
        for optimizer in optimizers:
            self._clip(
                optimizer,
                gradient_clip_val=value,
                gradient_clip_algorithm=algorithm,
            )

    def _in_order_of_module(self, optimizers: Iterable[Optimizer]) -> list[Tensor]:
        """The parameters of optimizers, in the order in which the module has them: a norm depends on it."""
        parameters = dict.fromkeys(chain.from_iterable(map(parameters_of, optimizers)))
        ordered = [p for p in self.run.module.parameters() if p in parameters]
        return [*dict.fromkeys(chain(ordered, parameters))]

    # Which parameters are trained.

    def toggle(self, optimizer: Any) -> None:
        """Let only this optimizer's parameters require gradients."""
        self.untoggle()
        own = set(parameters_of(optimizer))
        for other in self.optimizers:
            for parameter in parameters_of(other):
                if parameter not in own:
                    self._toggled.append((parameter, parameter.requires_grad))
                    parameter.requires_grad = False

    def untoggle(self) -> None:
        """Undo :meth:`toggle`."""
        for parameter, is_trained in reversed(self._toggled):
            parameter.requires_grad = is_trained
        self._toggled = []

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Optimizers by parameter names, schedulers, and the loss scale."""
        schedulers = self.schedulers.configs
        state: dict[str, Any] = {
            "optimizer_states": [
                self.engine.optimizer_state(optimizer) for optimizer in self.optimizers
            ],
            "lr_schedulers": [config.scheduler.state_dict() for config in schedulers],
            "optimizer_kinds": self._kinds,
        }
        if self.engine.scaler is not None:
            state["scaler"] = self.engine.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`.

        Raises:
            ValueError: if there were other optimizers or schedulers, whose states these cannot take.
        """
        configured = {
            "optimizer_states": self.optimizers,
            "lr_schedulers": self.schedulers.configs,
        }
        for name, now in configured.items():
            if len(state[name]) != len(now):
                raise ValueError(
                    f"the checkpoint has {len(state[name])} {name}, configure_optimizers made {len(now)}"
                )
        kinds = zip(state.get("optimizer_kinds", self._kinds), self._kinds, strict=True)
        changes = [f"its {was} is now a {now}" for was, now in kinds if was != now]
        try:
            self._load(state)
        except Exception as error:
            if not changes:
                raise
            raise ValueError(
                f"{', '.join(changes)}, which cannot take its state ({type(error).__name__}: {error}); to go on with "
                "other ones, load the weights with load_from_checkpoint and begin a new run"
            ) from error
        if changes:
            log.warning(
                "Resuming with other optimizers or schedulers than the checkpoint's, whose options stay: %s",
                ", ".join(changes),
            )

    def _load(self, state: dict[str, Any]) -> None:
        states = zip(self.optimizers, state["optimizer_states"], strict=True)
        for optimizer, saved in states:
            self.engine.load_optimizer_state(optimizer, saved)
        states = zip(self.schedulers.configs, state["lr_schedulers"], strict=True)
        for config, saved in states:
            _load_scheduler(config.scheduler, fill_unloaded(saved, config.scheduler))
        if self.engine.scaler is not None and "scaler" in state:
            self.engine.scaler.load_state_dict(state["scaler"])


def _load_scheduler(scheduler: Any, saved: dict[str, Any]) -> None:
    """Load a state, but not its number of steps if the scheduler was made for more, beyond which it would raise."""
    plan = ("total_steps", "_schedule_phases")
    planned = {name: value for name, value in vars(scheduler).items() if name in plan}
    scheduler.load_state_dict(saved)
    steps = planned.get("total_steps", 0)
    steps_saved = saved.get("total_steps", 0)
    if isinstance(scheduler, OneCycleLR) and steps > steps_saved:
        vars(scheduler).update(planned)
        log.warning(
            "OneCycleLR was made for %d steps, and is for %d now: it goes on in the longer cycle",
            steps_saved,
            steps,
        )


def override_of(module: Module, name: str) -> Callable[..., Any] | None:
    """The module's method, if it overrides it."""
    return getattr(module, name) if overrides(module, name, Module) else None


def _caller_of(run: Run) -> Callable[[Any, int], Any]:
    """What calls ``training_step`` with a batch and its index, under the run's strategy and precision."""
    forward = run.engine.forward
    if step_arguments(run.module.training_step) > 1:
        return partial(forward, "training_step")
    return lambda batch, batch_idx: forward("training_step", batch)


def step_arguments(step: Callable[..., Any]) -> int:
    """How many positional arguments a step takes: a batch, its index, and its loader's index."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p.kind for p in inspect.signature(step).parameters.values()]
    # It takes whatever it is given.
    if inspect.Parameter.VAR_POSITIONAL in parameters:
        return 3
    return max(1, sum(kind in kinds for kind in parameters))


def unpack(output: Any) -> tuple[Tensor, Any, dict[str, Any]]:
    """The loss, its weight, and what callbacks get of a step's dict: all of it, without graphs."""
    if not isinstance(output, dict) or not isinstance(output.get("loss"), Tensor):
        raise TypeError(
            'training_step must return the loss (a tensor), a dict with "loss" (a tensor), or None to skip the batch; '
            f"got {output!r}. If it runs the optimizer itself, set self.automatic_optimization = False"
        )
    outputs = {"loss": output["loss"].detach()}
    for key, value in output.items():
        outputs[key] = value.detach() if isinstance(value, Tensor) else value
    return output["loss"], output.get("weight"), outputs


def is_zero(weight: Any) -> bool:
    """Whether a weight is the number zero; a tensor is not read, as that would wait for the device."""
    return isinstance(weight, (int, float)) and weight == 0
