"""Lightning's ThroughputMonitor: its rows inside evaluations, on Loopwright's."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

from ....callbacks import ThroughputMonitor as NativeThroughputMonitor

__all__ = ["ThroughputMonitor"]


class ThroughputMonitor(NativeThroughputMonitor):
    """A :class:`~loopwright.callbacks.ThroughputMonitor`, with the same arguments.

    In an evaluation, a row comes after each ``log_every_n_steps`` batches, with the number of this stage's batches
    since the Trainer was made as its step; and outside of a fit, the counts go on from one evaluation to the next.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By stage: what was measured, and the number of batches since the beginning.
        self._measured: dict[str, Any] = {}
        self._evaluated: dict[str, int] = {}
        self._batches_of_run = 0

    def _start(self, trainer: Any, pl_module: Any) -> None:
        self._batches_of_run = 0
        super()._start(trainer, pl_module)
        stage = self._stage
        if stage is None:
            return
        before = self._measured.get(stage.name)
        if before is not None and trainer.state.fn != "fit":
            stage = replace(before, start=perf_counter() - before.counts.seconds)
        self._stage = self._measured[stage.name] = stage

    def _evaluated_batch(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        stage = self._stage
        if stage is None or trainer.sanity_checking:
            return
        self._add(trainer, pl_module, stage, batch)
        self._batches_of_run += 1
        self._evaluated[stage.name] = self._evaluated.get(stage.name, 0) + 1
        every = trainer.log_every_n_steps
        if every and self._batches_of_run % every == 0:
            self._log_at(trainer, stage, self._evaluated[stage.name])

    def _log_at(self, trainer: Any, stage: Any, step: int) -> None:
        self._mark(trainer, stage)
        begin = f"{stage.name}{self.separator}"
        values = self._values(trainer, stage)
        row = {f"{begin}{name}": value for name, value in values.items()}
        trainer.log_row(row, step)

    def _end(self, trainer: Any, pl_module: Any) -> None:
        # Its rows have come inside of it.
        pass

    on_test_start = on_predict_start = _start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        _evaluated_batch
    )
    on_test_end = on_predict_end = _end
