"""The optimizers and schedulers of a run, and the windows of micro-batches after which they step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint.serialization import unseal
from ..engine.step_errors import explain_step
from ..messages import log
from ..module import Module
from ..subclasses import overrides
from .manual import ManualOptimizer
from .optimizers import LRSchedulerConfig

if TYPE_CHECKING:
    from ..data.iteration import LookAhead
    from .micro_batch import MicroBatches
    from .run import Run


class Optimization:
    """Runs the optimizers of one ``fit``."""

    def __init__(
        self,
        run: Run,
        optimizers: list[Optimizer],
        schedulers: list[LRSchedulerConfig],
        kinds: list[str],
    ) -> None:
        trainer, engine, module = run.trainer, run.engine, run.module
        self.run = run
        self.engine, self.module = engine, module
        self.state = run.state
        self.optimizers, self.schedulers = optimizers, schedulers
        self.manual = [ManualOptimizer(optimizer, self) for optimizer in optimizers]
        self.kinds = kinds  # names of the optimizers' classes, then of the schedulers'
        # What configure_optimizers asked for, before anything was trained or loaded.
        self.configured = repr(
            [engine.optimizer_state(o)["param_groups"] for o in optimizers]
        )
        self.automatic = module.automatic_optimization
        self.accumulate = trainer.accumulate_grad_batches
        self.clip_value, self.clip_algorithm = (
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
        )
        self.anomaly = trainer.detect_anomaly
        self._several = engine.num_processes > 1
        self.bus = run.hooks
        forward = engine.forward
        takes_index = step_arguments(module.training_step) > 1
        self._call_step = (
            partial(forward, "training_step")
            if takes_index
            else _without_index(forward)
        )
        self._wants_outputs = bool(self.bus.on_train_batch_end)
        # A hook or default that nobody overrides is not called but done: a frame costs 0.1 to 0.3 µs a step.
        self._backward = (
            module.backward if overrides(module, "backward", Module) else None
        )
        self._optimizer_step = (
            module.optimizer_step
            if overrides(module, "optimizer_step", Module)
            else None
        )
        self._zero_grad = (
            module.optimizer_zero_grad
            if overrides(module, "optimizer_zero_grad", Module)
            else None
        )
        clip = overrides(module, "configure_gradient_clipping", Module)
        self._clip = (
            module.configure_gradient_clipping if clip or self.clip_value else None
        )
        step = overrides(module, "lr_scheduler_step", Module)
        self._scheduler_step = module.lr_scheduler_step if step else None
        by_step = [config for config in schedulers if config.interval == "step"]
        self._each_step = (
            [config for config in by_step if not config.reduce_on_plateau]
            if self.automatic
            else []
        )
        self.plateau_each_step = (
            [config for config in by_step if config.reduce_on_plateau]
            if self.automatic
            else []
        )
        self._each_epoch = (
            [config for config in schedulers if config.interval == "epoch"]
            if self.automatic
            else []
        )
        self._choose_short_ways()
        self.train_on = self.automatic_step if self.automatic else self.manual_step

        self._toggled: list[tuple[Tensor, bool]] = []
        self.stepped = False  # whether the last batch completed a window
        self.has_zero_weights = False  # whether a batch has been left out by its weight
        self.window = engine.new_window()
        self.micro: MicroBatches | None = None
        if trainer.micro_batch is not None:
            from .micro_batch import MicroBatches

            self.micro = MicroBatches(self, trainer.micro_batch)

    def _choose_short_ways(self) -> None:
        """For each part of a step to which nobody adds anything, what to call directly."""
        engine, bus = self.engine, self.bus
        plain = engine.plain_backward()
        backward = self._backward is None and plain is not None and not self.anomaly
        backward = backward and not bus.on_before_backward and not bus.on_after_backward
        self._compute_gradients = (
            plain if backward and plain is not None else self.backward
        )
        clear = (
            self._zero_grad is None
            and not bus.on_before_zero_grad
            and len(self.optimizers) == 1
        )
        self._clear_gradients = self.optimizers[0].zero_grad if clear else None
        step = (
            self._optimizer_step is None
            and self._clip is None
            and not bus.on_before_optimizer_step
        )
        step = step and len(self.optimizers) == 1
        self._step_directly = engine.plain_step(self.optimizers[0]) if step else None
        # Whether a step is these three calls and nothing else.
        self._short = (
            backward
            and clear
            and self._step_directly is not None
            and not self._each_step
        )
        self._short = self._short and not self._several

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Step these from now on."""
        self.optimizers = optimizers
        self.manual = [ManualOptimizer(optimizer, self) for optimizer in optimizers]
        self._choose_short_ways()

    # -- the training step, automatic -------------------------------------------------------------------------

    def automatic_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Forward, backward and, at the end of a window, step.

        Args:
            batch: the batch.
            batch_idx: its index in the epoch.

        Returns:
            ``{"loss": loss, ...}`` as the step returned it, or None if it skipped the batch.
        """
        if self.micro is not None:
            return self._step_in_parts(batch, batch_idx)
        if self.accumulate == 1:
            output = self._call_step(batch, batch_idx)
            if self._short and isinstance(output, Tensor):
                try:
                    self._clear_gradients()  # pyright: ignore[reportOptionalCall] # what _short says
                    self._compute_gradients(output)
                    self._step_directly()  # pyright: ignore[reportOptionalCall] # as above
                except Exception as error:
                    explain_step(error, output)
                    raise
                self.state.global_step += 1
                self.stepped = True
                return {"loss": output.detach()} if self._wants_outputs else None
            outputs = self._gather(output, batch_idx)
            self.stepped = self.close_window(batch_idx)
            return outputs
        if batch_idx >= self.window.end:  # the window before is complete: open the next
            self.open_window(batch_idx)
        last = batch_idx + 1 == self.window.end
        with nullcontext() if last else self.engine.no_sync():
            outputs = self._gather(self._call_step(batch, batch_idx), batch_idx)
        self.stepped = last and self.close_window(batch_idx)
        return outputs

    def _step_in_parts(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """As :meth:`automatic_step`, with parts of the batch one after the other."""
        assert self.micro is not None
        if batch_idx >= self.window.end:
            self.open_window(batch_idx)
        outputs = self.micro.gather(batch, batch_idx, self._gather_part)
        self.stepped = batch_idx + 1 == self.window.end and self.close_window(batch_idx)
        return outputs

    def _gather_part(
        self, part: Any, batch_idx: int, fraction: float, first: bool
    ) -> dict[str, Any] | None:
        """Run the step on a part of a batch, and add its gradients."""
        return self._gather(
            self._call_step(part, batch_idx), batch_idx, (fraction, first)
        )

    def manual_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Call the step, which does the rest itself."""
        if batch_idx >= self.window.end:
            self.open_window(batch_idx)
        self.stepped = False
        output = self._call_step(batch, batch_idx)
        if batch_idx + 1 == self.window.end:
            self._finish_updates()  # of optimizers that had no update(loss) in the window's last batch
        if self.stepped:
            self.engine.end_window()
            self.state.global_step += 1
        return _outputs(output)

    def begin_windows(self) -> None:
        """The next batch begins a window, of as many batches as the Trainer says then."""
        self.accumulate = self.run.trainer.accumulate_grad_batches
        self.window.open(0, 1)
        self.window.end = 0

    def change_accumulation(self) -> None:
        """The Trainer says another number of batches: for the next window; one that has been opened stays."""
        if self.state.batch_idx >= self.window.end:
            self.begin_windows()

    def open_window(self, batch_idx: int) -> None:
        """Begin a window at ``batch_idx``; the epoch's end may end it early."""
        self.accumulate = self.run.trainer.accumulate_grad_batches
        left = self.run.schedule.length - batch_idx
        self.window.open(batch_idx, int(min(self.accumulate, left)))

    def ends_inside_window(self, batches: LookAhead) -> bool:
        """Whether the epoch ends with a batch that does not complete its window, which then ends with it, too.

        Only inside a window is a batch read ahead: at its end, where checkpoints are saved, the loader has given what
        was trained on, and no more.
        """
        num_batches = self.state.batch_idx + 1
        if self.accumulate == 1 or num_batches == self.window.end:
            return False
        if not batches.at_end:
            return False
        self.window.end = min(self.window.end, num_batches)
        return True

    @property
    def window_is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return self.window.count > 0 or any(manual._gathered for manual in self.manual)

    def close_open_window(self, batch_idx: int) -> None:
        """The epoch ended sooner than planned, at ``batch_idx``: step on what was gathered until there."""
        for optimizer in (
            self.optimizers
            if self._several and self.accumulate > 1 and self.micro is None
            else ()
        ):
            # No backward of the window's last batch has averaged them over the processes.
            self.engine.sync_gradients_of(optimizer)
        if self.automatic:
            self.stepped = self.close_window(batch_idx)
            self.window.end = 0
            return
        self._finish_updates()
        self.window.end = 0
        self.engine.end_window()
        self.state.global_step += 1

    def _gather(
        self, output: Any, batch_idx: int, part: tuple[float, bool] | None = None
    ) -> dict[str, Any] | None:
        """Add the gradients of a step's output to the window's; of a part, which is a fraction of the batch."""
        weight = None
        if isinstance(output, Tensor):
            loss, outputs = output, None
        elif output is None and self._several:
            raise RuntimeError(
                f"training_step returned None on rank {self.engine.process_index}, batch {batch_idx}: with several "
                "processes each gives a loss for each batch, as the others wait for its gradients. To leave a batch "
                'out, return {"loss": loss, "weight": 0} for it, and weights for all the others'
            )
        elif output is None:
            self.run.warn_once(
                "training_step returned None, so its batch is left out (epoch %d, batch %d): if that is not meant, "
                "return the loss", self.state.epoch, batch_idx,
            )  # fmt: skip
            return None
        elif (
            isinstance(output, dict)
            and not self._several
            and _is_zero(output.get("weight"))
        ):
            self.has_zero_weights = True
            return None
        else:
            loss, weight, outputs = _unpack(output)
        if self.window.count == 0:
            if self._clear_gradients is not None:
                self._clear_gradients()
            else:
                self.zero_grad(batch_idx)
        window = self.window
        try:
            self._compute_gradients(
                window.add(loss, weight)
                if part is None
                else window.add_part(loss, weight, *part)
            )
        except Exception as error:
            explain_step(error, loss)
            raise
        if outputs is None and (self._wants_outputs or part is not None):
            outputs = {"loss": loss.detach()}
        return outputs

    def close_window(self, batch_idx: int) -> bool:
        """Step on what the window gathered, be it fewer batches than planned; False if it gathered nothing."""
        window = self.window
        if not window.count:
            return False
        if self.micro is not None and self._several:
            self.engine.sync_gradients_of(self.optimizers[0])
        try:
            if self._step_directly is not None and window.is_complete:
                self._step_directly()
            else:
                self._step_window(self.optimizers[0], batch_idx)
        except Exception as error:
            explain_step(error)
            raise
        window.close()
        self.state.global_step += 1
        for config in self._each_step:
            if (
                not self.engine.step_was_skipped
                and self.state.global_step % config.frequency == 0
            ):
                self._step_scheduler(config, None)
        return True

    def _step_window(self, optimizer: Optimizer, batch_idx: int) -> None:
        self.engine.complete_gradients(optimizer)
        for hook in self.bus.on_before_optimizer_step:
            hook(optimizer)
        if self._clip is not None:
            self._clip(
                optimizer,
                gradient_clip_val=self.clip_value,
                gradient_clip_algorithm=self.clip_algorithm,
            )
        if self._optimizer_step is not None:
            self._optimizer_step(self.state.epoch, batch_idx, self.manual[0])
        else:
            self.engine.step(optimizer)
        self.engine.end_window()

    # -- the parts, shared with manual optimization -----------------------------------------------------------

    def zero_grad(self, batch_idx: int) -> None:
        """Clear the gradients of the last window."""
        for optimizer in self.optimizers:
            self._zero_grad_of(optimizer, batch_idx)

    def _zero_grad_of(self, optimizer: Optimizer, batch_idx: int) -> None:
        for hook in self.bus.on_before_zero_grad:
            hook(optimizer)
        if self._zero_grad is not None:
            self._zero_grad(self.state.epoch, batch_idx, optimizer)
        else:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, between its hooks."""
        if self.anomaly and not bool(
            torch.isfinite(loss).all()
        ):  # a host–device sync, asked for by detect_anomaly
            raise RuntimeError(
                f"the loss is {loss.item()} at {self.state.where}: look at this batch and at what the step computes "
                "(detect_anomaly=True)"
            )
        if self._several and not self.automatic and self.window.share != 1.0:
            loss = loss * self.window.share
        for hook in self.bus.on_before_backward:
            hook(loss)
        try:
            self.engine.compute_gradients(loss, *args, run=self._backward, **kwargs)
        except Exception as error:
            explain_step(error, loss)
            raise
        for hook in self.bus.on_after_backward:
            hook()

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step ``optimizer``: in manual optimization with its hook, in automatic the loop has called it."""
        if self.automatic:
            return self.engine.step(optimizer, closure)
        if closure is None:
            self.engine.unscale(optimizer)
        for hook in self.bus.on_before_optimizer_step:
            hook(optimizer)
        self.stepped = True
        return self.engine.step(optimizer, closure)

    def update(self, manual: ManualOptimizer, loss: Tensor) -> None:
        """``ManualOptimizer.update``."""
        if self.automatic:
            raise RuntimeError(
                "update(loss) is for manual optimization; set self.automatic_optimization = False"
            )
        batch_idx, optimizer = self.state.batch_idx, manual.optimizer
        if self.accumulate > 1 and manual._updated == self.state.total_batches:
            raise RuntimeError(
                f"update(loss) was called twice for one optimizer in batch {batch_idx}; "
                f"with accumulate_grad_batches={self.accumulate} it can be called once a batch"
            )
        manual._updated = self.state.total_batches
        if manual._gathered == 0:
            self._zero_grad_of(optimizer, batch_idx)
        length = self.window.length
        last = batch_idx + 1 == self.window.end
        with nullcontext() if last else self.engine.no_sync():
            self.backward(loss / length if length > 1 else loss)
        manual._gathered += 1
        if last:
            self._finish_update(manual)

    def _finish_updates(self) -> None:
        for manual in self.manual:
            if manual._gathered:
                self._finish_update(manual)

    def _finish_update(self, manual: ManualOptimizer) -> None:
        optimizer = manual.optimizer
        self.engine.unscale(optimizer)
        if manual._gathered < self.window.length:
            self.engine.scale_gradients(
                optimizer, self.window.length / manual._gathered
            )
        manual._gathered = 0
        for hook in self.bus.on_before_optimizer_step:
            hook(optimizer)
        if self._clip is not None:
            self._clip(
                optimizer,
                gradient_clip_val=self.clip_value,
                gradient_clip_algorithm=self.clip_algorithm,
            )
        self.stepped = True
        self.engine.step(optimizer)

    def toggle(self, optimizer: Any) -> None:
        """Let only this optimizer's parameters require gradients."""
        self.untoggle()
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for other in self.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in own:
                        self._toggled.append((parameter, parameter.requires_grad))
                        parameter.requires_grad = False

    def untoggle(self) -> None:
        """Undo :meth:`toggle`."""
        for parameter, required in reversed(self._toggled):
            parameter.requires_grad = required
        self._toggled = []

    # -- schedulers -------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Step the schedulers that step by epochs; those that wait for a monitored value do so later."""
        for config in self._each_epoch:
            if (
                not config.reduce_on_plateau
                and (self.state.epoch + 1) % config.frequency == 0
            ):
                self._step_scheduler(config, None)

    def plateau_each_epoch(self) -> None:
        """Step, at the very end of an epoch, the schedulers that monitor a value."""
        due = [
            c
            for c in self._each_epoch
            if c.reduce_on_plateau and (self.state.epoch + 1) % c.frequency == 0
        ]
        self._monitor(due)

    def step_waiting_plateau(self) -> None:
        """Step the schedulers that monitor a value by steps, if they have not done so since the last window."""
        if not self.state.plateau_waits:
            return
        self.state.end_waiting()
        due = [
            config
            for config in self.plateau_each_step
            if self.state.global_step % config.frequency == 0
        ]
        self._monitor(due)

    def _monitor(self, due: list[LRSchedulerConfig]) -> None:
        for config in due:
            logged = self.run.trainer.callback_metrics
            assert config.monitor is not None
            value = self.engine.broadcast(
                logged.get(config.monitor)
            )  # a step's value is each process's own
            if value is not None:
                self._step_scheduler(config, value)
            elif config.strict:
                raise RuntimeError(
                    f"{type(config.scheduler).__name__} monitors {config.monitor!r}, which was not logged by the time "
                    f"it steps; logged were: {', '.join(sorted(logged)) or 'none'}. Log it, name another, raise the "
                    'scheduler\'s "frequency", or set "strict": False'
                )

    def _step_scheduler(self, config: LRSchedulerConfig, metric: Any) -> None:
        if self._scheduler_step is not None:
            self._scheduler_step(config.scheduler, metric)
        elif metric is None:
            config.scheduler.step()
        else:
            config.scheduler.step(metric)

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimizers by parameter names, schedulers, and the loss scale."""
        state: dict[str, Any] = {
            "optimizer_states": [
                self.engine.optimizer_state(optimizer) for optimizer in self.optimizers
            ],
            "lr_schedulers": [
                config.scheduler.state_dict() for config in self.schedulers
            ],
            "optimizer_kinds": self.kinds,
        }
        if self.engine.scaler is not None:
            state["scaler"] = self.engine.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`.

        Raises:
            ValueError: if there were other optimizers or schedulers, whose states these cannot take.
        """
        for name, now in (
            ("optimizer_states", self.optimizers),
            ("lr_schedulers", self.schedulers),
        ):
            if len(state[name]) != len(now):
                raise ValueError(
                    f"the checkpoint has {len(state[name])} {name}, configure_optimizers made {len(now)}"
                )
        kinds = zip(state.get("optimizer_kinds", self.kinds), self.kinds, strict=True)
        changed = ", ".join(
            f"its {was} is now a {now}" for was, now in kinds if was != now
        )
        try:
            for optimizer, saved in zip(
                self.optimizers, state["optimizer_states"], strict=True
            ):
                self.engine.load_optimizer_state(optimizer, saved)
            for config, saved in zip(
                self.schedulers, state["lr_schedulers"], strict=True
            ):
                config.scheduler.load_state_dict(unseal(saved, config.scheduler))
        except Exception as error:
            if not changed:
                raise
            raise ValueError(
                f"{changed}, which cannot take its state ({type(error).__name__}: {error}); to go on with other ones, "
                "load the weights with load_from_checkpoint and begin a new run"
            ) from error
        if changed:
            log.warning("Resuming with other optimizers or schedulers than the checkpoint's, whose options stay: %s",
                        changed)  # fmt: skip
        if self.engine.scaler is not None and "scaler" in state:
            self.engine.scaler.load_state_dict(state["scaler"])


def _unpack(output: Any) -> tuple[Tensor, Any, dict[str, Any]]:
    """The loss, its weight, and all of a step's dict."""
    if not isinstance(output, dict) or not isinstance(output.get("loss"), Tensor):
        raise TypeError(
            'training_step must return the loss (a tensor), a dict with "loss" (a tensor), or None to skip the batch; '
            f"got {output!r}. If it runs the optimizer itself, set self.automatic_optimization = False"
        )
    outputs = {key: value for key, value in output.items() if key != "loss"}
    detached = {
        key: value.detach() if isinstance(value, Tensor) else value
        for key, value in outputs.items()
    }
    return (
        output["loss"],
        output.get("weight"),
        {"loss": output["loss"].detach(), **detached},
    )


def _outputs(output: Any) -> Any:
    """What callbacks get of a manual step's result: without its graph."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"].detach()}
    return output


def _is_zero(weight: Any) -> bool:
    """Whether a weight is the number zero; a tensor is not read, as that would wait for the device."""
    return isinstance(weight, (int, float)) and weight == 0


def _without_index(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda batch, batch_idx: forward("training_step", batch)


def step_arguments(step: Callable[..., Any]) -> int:
    """How many positional arguments a step takes: a batch, its index, and its loader's index."""
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(step).parameters.values()
    if any(
        parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters
    ):
        return 3
    return max(1, sum(parameter.kind in kinds for parameter in parameters))
