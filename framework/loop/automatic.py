"""Automatic optimization: ``training_step`` returns a loss, and the loop does the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..engine.step_errors import explain_step
from .micro_batch import MicroBatches
from .optimizers import LRSchedulerConfig, ManualOptimizer
from .step import Step, is_zero, override_of, unpack

if TYPE_CHECKING:
    from .compiled_step import CompiledStep
    from .run import Run


class LossStep(Step):
    """Trains on the loss that ``training_step`` returns; :class:`AutomaticStep` or :class:`~.closure.ClosureStep`.

    Its arguments are those of :class:`~.step.Step`.
    """

    def add_gradients(
        self, output: Any, batch_idx: int, part: tuple[float, bool] | None = None
    ) -> dict[str, Any] | None:
        """Add the gradients of a step's output to the window's.

        Args:
            output: what ``training_step`` returned.
            batch_idx: the batch's index in the epoch.
            part: if it was given a part of the batch, that part's fraction, and whether it is the first.

        Returns:
            What callbacks get of it.
        """
        if output is None:
            self._note_missing_loss(batch_idx)
            return None
        window = self.accumulation
        weight = None
        outputs = None
        if isinstance(output, Tensor):
            loss = output
            if self.wants_outputs or part is not None:
                outputs = {"loss": loss.detach()}
        else:
            loss, weight, outputs = unpack(output)
            if is_zero(weight) and not self.has_ranks:
                self.leaves_out = True
                return None
        if window.count == 0:
            self._begin_window(batch_idx)
        if part is None:
            loss = window.add(loss, weight)
        else:
            loss = window.add_part(loss, weight, *part)
        self.backward(loss)
        return outputs

    def _begin_window(self, batch_idx: int) -> None:
        """Clear the gradients of the last window."""
        for optimizer in self.optimizers:
            self.zero_grad(optimizer, batch_idx)
        if not self.optimizers:
            self.run.module.zero_grad()

    def _note_missing_loss(self, batch_idx: int) -> None:
        """Say that a batch without a loss is left out; raise with several ranks, where the others wait for it."""
        if self.has_ranks:
            raise RuntimeError(
                f"training_step returned None on rank {self.engine.process_index}, batch {batch_idx}: with several "
                "processes each gives a loss for each batch, as the others wait for its gradients. To leave a batch "
                'out, return {"loss": loss, "weight": 0} for it, and weights for all the others'
            )
        self.run.warn_once(
            "training_step returned None, so its batch is left out (epoch %d, batch %d): if that is not meant, "
            "return the loss",
            self.state.epoch,
            batch_idx,
        )

    def count_window(self) -> None:
        """Count a window that has been stepped on, and step the schedulers that step with it."""
        window = self.accumulation
        window.count_step()
        if window.total_weight is not None:
            self.state.tokens.add(window.total_weight)
        self.engine.end_window()
        self.schedulers.step_after_window()

    def count_plain_step(self) -> None:
        """Count a window of one batch that a shorter way has stepped on, and step the schedulers."""
        self.accumulation.count_step()
        self.stepped = True
        if self.schedulers.each_step:
            self.schedulers.step_after_window()

    def update(self, optimizer: ManualOptimizer, loss: Tensor) -> None:
        """Refuse ``optimizer.update(loss)``."""
        raise RuntimeError(
            "update(loss) is for manual optimization; set self.automatic_optimization = False"
        )


class AutomaticStep(LossStep):
    """Forward, backward and, at the window's end, the steps of the optimizers: usually one, of the same loss.

    Its arguments and attributes are those of :class:`LossStep`.
    """

    def __init__(
        self,
        run: Run,
        optimizers: list[Optimizer],
        schedulers: list[LRSchedulerConfig],
        kinds: list[str],
    ) -> None:
        super().__init__(run, optimizers, schedulers, kinds)
        self._optimizer_step = override_of(run.module, "optimizer_step")
        self._is_dropped = False
        self._shorter: CompiledStep | PlainStep | None = None
        self._micro_batches: MicroBatches | None = None
        if run.trainer.micro_batch is not None:
            self._micro_batches = MicroBatches(self, run.trainer.micro_batch)

    @property
    def overrides_a_part(self) -> bool:
        """Whether the module, or gradient clipping, takes the place of a part of the step."""
        return super().overrides_a_part or self._optimizer_step is not None

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Step these from now on."""
        super().replace_optimizers(optimizers)
        if self._shorter is not None and optimizers:
            self._shorter.use(optimizers[0])

    def replace_schedulers(self, schedulers: list[Any]) -> None:
        """Step these from now on."""
        super().replace_schedulers(schedulers)
        # A scheduler that is made replaces the optimizer's function, to notice calls of it.
        if isinstance(self._shorter, PlainStep):
            self._shorter.use(self.optimizers[0])

    @property
    def train_on(self) -> Callable[[Any, int], dict[str, Any] | None]:
        """What the loop calls with a batch and its index: this step, or a shorter one if that does the same."""
        if self._shorter is None:
            self._shorter = self._compiled() or self._plain()
        return self._shorter or self

    def _plain(self) -> PlainStep | None:
        """A shorter way through the step, if it does the same."""
        return PlainStep(self) if PlainStep.suffices(self) else None

    def _compiled(self) -> CompiledStep | None:
        """The step as one graph, if that was asked for and nothing is known to stand against it."""
        options = self.run.compile_step
        if options is None:
            return None
        from .compiled_step import (
            CompiledStep,
            compile_parts,
            reason_against_optimizer,
            reason_against_overrides,
        )

        self.run.compile_steps(None)
        reason = reason_against_overrides(self) or reason_against_optimizer(self)
        if reason:
            compile_parts(self.run, options, reason)
            return None
        return CompiledStep(self, options)

    def give_up_graph(self) -> Callable[[Any, int], dict[str, Any] | None]:
        """Train without a graph of the whole step from now on; returns what to call with a batch and its index."""
        self._shorter = self._plain()
        return self._shorter or self

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        window = self.accumulation
        window.begin(batch_idx, self.run.schedule.length - batch_idx)
        if self._micro_batches is not None:
            outputs = self._micro_batches.train_on(
                batch, batch_idx, self._train_on_part
            )
        elif window.is_last:
            outputs = self.add_gradients(self.call_step(batch, batch_idx), batch_idx)
        else:
            with self.engine.no_sync():
                outputs = self.add_gradients(
                    self.call_step(batch, batch_idx), batch_idx
                )
        self.stepped = window.is_last and self.end_window(batch_idx)
        return outputs

    def _train_on_part(
        self, part: Any, batch_idx: int, fraction: float, is_first: bool
    ) -> dict[str, Any] | None:
        """Add the gradients of a part of a batch, for :class:`~.micro_batch.MicroBatches`."""
        output = self.call_step(part, batch_idx)
        return self.add_gradients(output, batch_idx, (fraction, is_first))

    def finish(self, output: Any, batch_idx: int) -> dict[str, Any] | None:
        """Do what is left of a step whose forward has run already, in a window of its own."""
        self.accumulation.begin(batch_idx, 1)
        outputs = self.add_gradients(output, batch_idx)
        self.stepped = self.end_window(batch_idx)
        return outputs

    def end_window(self, batch_idx: int) -> bool:
        """Step on what the window has gathered; False if it has gathered nothing."""
        if not self.accumulation.count:
            return False
        try:
            if self._micro_batches is not None and self.has_ranks:
                for optimizer in self.optimizers:
                    self.engine.sync_gradients_of(optimizer)
            self.engine.complete_gradients(*self.optimizers)
            self.prepare_step(*self.optimizers)
            if self._is_dropped:
                return self._drop_window()
            self._step_all(batch_idx)
        except Exception as error:
            explain_step(error)
            raise
        self.count_window()
        return True

    def drop_window(self) -> None:
        """Take no step with the gradients of this window, if a hook before the step asks for that."""
        self._is_dropped = True

    def _drop_window(self) -> bool:
        """Forget the window, without a step of optimizers, schedulers or the loss scale; returns False."""
        self._is_dropped = False
        self.leaves_out = True
        self.engine.end_window()
        return False

    def _step_all(self, batch_idx: int) -> None:
        """Step all optimizers, their gradients complete and clipped."""
        if self._optimizer_step is not None:
            for manual in self.manual:
                self._optimizer_step(self.state.epoch, batch_idx, manual)
            return
        for optimizer in self.optimizers:
            self.engine.step(optimizer)

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step an optimizer, for a module's ``optimizer_step``."""
        return self.engine.step(optimizer, closure)


class PlainStep:
    """A short way through :class:`AutomaticStep`, where neither hooks nor overrides add to it: three calls.

    Args:
        whole: the step that does the rest, where a batch asks for more.
    """

    def __init__(self, whole: AutomaticStep) -> None:
        self._whole = whole
        self._accumulation = whole.accumulation
        self._schedulers = whole.schedulers
        self._call_step = whole.call_step
        self._wants_outputs = whole.wants_outputs
        self.use(whole.optimizers[0])

    @staticmethod
    def suffices(step: AutomaticStep) -> bool:
        """Whether nothing else is to be done: by hooks, module, precision, strategy or the Trainer's arguments."""
        hooks = step.run.hooks
        trainer = step.run.trainer
        added = (
            len(step.optimizers) != 1,
            hooks.on_before_zero_grad,
            hooks.on_before_backward,
            hooks.on_after_backward,
            hooks.on_before_optimizer_step,
            step.overrides_a_part,
            trainer.detect_anomaly,
            trainer.micro_batch,
            step.has_ranks,
        )
        return not any(added) and step.engine.plain_backward() is not None

    def use(self, optimizer: Optimizer) -> None:
        """Step this optimizer from now on."""
        self._zero_grad = optimizer.zero_grad
        self._backward: Any = self._whole.engine.plain_backward()
        self._step: Any = self._whole.engine.plain_step(optimizer)

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        window = self._accumulation
        # Windows of several batches go the long way, and so does the rest of one that was begun.
        if window.num_batches > 1 or not window.is_last:
            return self._whole(batch, batch_idx)
        loss = self._call_step(batch, batch_idx)
        if not isinstance(loss, Tensor):
            return self._whole.finish(loss, batch_idx)
        try:
            self._zero_grad()
            self._backward(loss)
            self._step()
        except Exception as error:
            explain_step(error, loss)
            raise
        window.count_step()
        self._whole.stepped = True
        if self._schedulers.each_step:
            self._schedulers.step_after_window()
        return {"loss": loss.detach()} if self._wants_outputs else None
