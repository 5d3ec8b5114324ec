"""Sections of the loop under the names that Lightning's SimpleProfiler has for them."""

from __future__ import annotations

from typing import Any

from ....callbacks import SimpleProfiler

_NEXT = "[_TrainingEpochLoop].train_dataloader_next"
# What the steps of an evaluation are called, by stage.
_STEPS = {
    "sanity_check": "validation_step",
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}


class ProfiledSections(SimpleProfiler):
    """Records the durations of epochs, batches, steps, backward passes and waiting for data, by Lightning's names."""

    def _open(self, name: str) -> None:
        # A batch may have been left without its end.
        self._shut(name)
        self.start(name)

    def _shut(self, name: str) -> None:
        if name in self._started:
            self.stop(name)

    def _leave_out(self, name: str) -> None:
        """Forget a section that has begun, as what it was to measure does not come."""
        self._started.pop(name, None)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._open("run_training_epoch")
        self._open(_NEXT)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # There was no other batch.
        self._leave_out(_NEXT)
        self._shut("run_training_epoch")

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._shut(_NEXT)
        self._open("run_training_batch")
        self._open(_step_name(trainer, "training_step"))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self._shut(_step_name(trainer, "training_step"))
        self._open(_step_name(trainer, "backward"))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        super().on_after_backward(trainer, pl_module)
        self._shut(_step_name(trainer, "backward"))

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Any
    ) -> None:
        self._open(_optimizer_step(pl_module))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Without a loss, there was no backward pass.
        self._shut(_step_name(trainer, "training_step"))
        self._shut(_optimizer_step(pl_module))
        self._shut("run_training_batch")
        self._open(_NEXT)

    def _on_evaluation_batch_start(
        self, trainer: Any, pl_module: Any, *batch: Any
    ) -> None:
        SimpleProfiler.on_validation_batch_start(self, trainer, pl_module, *batch)
        # A validation may interrupt the training's waiting for its next batch.
        self._leave_out(_NEXT)
        self._open(_step_name(trainer, _STEPS[str(trainer.state.stage)]))

    def _on_evaluation_batch_end(
        self, trainer: Any, pl_module: Any, *batch: Any
    ) -> None:
        SimpleProfiler.on_validation_batch_end(self, trainer, pl_module, *batch)
        self._shut(_step_name(trainer, _STEPS[str(trainer.state.stage)]))

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        _on_evaluation_batch_start
    )
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        _on_evaluation_batch_end
    )


def _step_name(trainer: Any, step: str) -> str:
    """The name of what the strategy does."""
    return f"[Strategy]{type(trainer.strategy).__name__}.{step}"


def _optimizer_step(module: Any) -> str:
    return f"[LightningModule]{type(module).__name__}.optimizer_step"
