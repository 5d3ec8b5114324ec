"""The callback contract: every moment of a run at which code of your own can be called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .logging_module import module_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ..framework import Module, Trainer


class Callback:
    """Code that is called at named moments of a run. Override the methods you need; the rest cost nothing.

    At each moment the callbacks run by phase: those that *observe* (the default), in the order in which the
    Trainer got them, then the module's own hook of that name, then those that *decide* (early stopping), then
    those that *persist* (checkpoints). So a callback that saves sees what the others did, and what it saves
    is complete.

    The Trainer refuses a method whose name is nearly that of a hook, unless the class calls it itself.
    """

    phase: ClassVar[Literal["observe", "decide", "persist"]] = "observe"
    # A WeightSet: weights beside the module's, which checkpoints hold, and evaluations may run on.
    weight_set: Any = None

    @property
    def state_key(self) -> str:
        """Under which name :meth:`state_dict` is stored. Two callbacks of one class need different keys."""
        return type(self).__qualname__

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log a value in a hook: ``self.log(name, value, …)`` is ``pl_module.log(name, value, …)``."""
        module_of(self).log(*args, **kwargs)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Log several values at once: ``self.log_dict(values, …)`` is ``pl_module.log_dict(values, …)``."""
        module_of(self).log_dict(*args, **kwargs)

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What to store in a checkpoint: tensors, and values that JSON can hold, in dicts, lists and tuples."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned when the checkpoint was saved."""

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is about to be written; keys may be added to it."""

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint was read and is about to be applied."""

    # -- the run ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """A run begins. ``stage`` is ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """A run ended normally; after an exception, :meth:`on_exception` is called instead."""

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        """An exception ends the run; it is raised again afterwards."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The model is on its device, and optimizers are made.

        In a resumed run, the checkpoint is loaded except for the states of optimizers and schedulers, which come next:
        a callback that has added parameter groups adds them again here.
        """

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Fitting ended normally."""

    # -- training ---------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """A few validation batches are about to run before training."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """These batches have passed."""

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Training is about to begin, or to go on from a checkpoint."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The last epoch ended."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch ended; its validation, if due, has run."""

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Module,
        batch: Any,
        batch_idx: int,
    ) -> int | None:
        """Before a training step. Returning -1 skips the rest of the epoch."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After a training step. ``outputs`` is ``{"loss": detached loss, ...}`` or None."""

    def on_before_zero_grad(
        self,
        trainer: Trainer,
        pl_module: Module,
        optimizer: Optimizer,
    ) -> None:
        """The gradients of the last accumulation window are about to be cleared."""

    def on_before_backward(
        self,
        trainer: Trainer,
        pl_module: Module,
        loss: Tensor,
    ) -> None:
        """Before the backward pass; ``loss`` is already divided for accumulation, not yet scaled."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """After the backward pass; under ``"16-mixed"`` the gradients are still scaled."""

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: Module,
        optimizer: Optimizer,
    ) -> None:
        """The window's gradients are complete and unscaled, not yet clipped."""

    # -- validation, testing and prediction, whose hooks are alike ----------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation, testing or prediction begins; the module is in evaluation mode."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation, testing or prediction ended; its metrics are in ``trainer.callback_metrics``."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the first batch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After the last batch; values may still be logged (not in prediction)."""

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: Module,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Before a validation, test or predict step."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a validation, test or predict step; ``outputs`` is what it returned."""

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
