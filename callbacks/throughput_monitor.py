"""Log how much a run gets done in a second."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .arguments import require, require_int
from .base import Callback
from .peak_flops import available_flops

if TYPE_CHECKING:
    from ..framework import Module, Trainer


@dataclass
class _Counts:
    """What this process has done since a stage began, after ``seconds`` of it."""

    seconds: float = 0.0
    batches: int = 0
    samples: Any = 0
    items: Any = 0
    flops: float = 0.0
    steps: int = 0


@dataclass
class _Stage:
    """A stage that is measured.

    Attributes:
        name: what it is called.
        start: when it began, on the clock of ``perf_counter``; later by what interrupted it.
        must_measure: its operations are to be counted in its next batch.
        tells_flops: the module tells them.
        flops_per_sample: as measured.
        counts: until now.
        marks: copies of ``counts``, taken when the device had done all of it.
        logged_step: the optimizer step of the last row.
    """

    name: str
    start: float
    must_measure: bool
    tells_flops: bool
    flops_per_sample: float = 0.0
    counts: _Counts = field(default_factory=_Counts)
    marks: deque[_Counts] = field(default_factory=deque)
    logged_step: int = 0


class FlopCount:
    """Counts floating-point operations from when it is made until it is closed."""

    def __init__(self) -> None:
        self._contexts = ExitStack()
        # What dynamo meets while a counter is there, it would leave uncompiled for ever.
        if "torch._dynamo" in sys.modules:
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        self._mode = self._contexts.enter_context(FlopCounterMode(display=False))

    def close(self) -> float:
        """End; returns the number."""
        self._contexts.close()
        return float(self._mode.get_total_flops())


class ThroughputMonitor(Callback):
    """Log samples, batches, optimizer steps, items and floating-point operations per second.

    Rows come with those of ``log_every_n_steps``, and at the end of each evaluation. Names begin with the stage:

    - ``train/time`` in seconds, ``train/batches``, ``train/samples``, ``train/lengths``: since the stage began, in this
      process;
    - ``train/device/batches_per_sec``, ``…/samples_per_sec``, ``…/items_per_sec`` (``…/tokens_per_sec`` where they are
      found in the batch), ``…/flops_per_sec``: of one process, over the last ``window_size`` batches, as soon as there
      were so many; ``train/steps_per_sec``: optimizer steps;
    - ``train/batches_per_sec`` and so on: the same of all processes, if there are several;
    - ``train/device/mfu``: operations per second as a fraction of what the device could do, where that is known.

    The device is waited for only when a row is due. What validation takes does not count in the training.

    Args:
        batch_size_fn: gives the number of samples in a batch. Default: what ``log`` weighs a batch with.
        length_fn: gives the number of items in a batch, such as tokens. Default: the elements of its ``"input_ids"``,
            padding included, if it has these.
        window_size: batches over which rates are taken.
        separator: stands between the parts of names.
        measure_flops: count the operations of each stage's first batch by torch's ``FlopCounterMode``, unless the
            module has an attribute ``flops_per_batch``. That batch runs uncompiled, also where a model is compiled.
            What the counter does not see, such as kernels of one's own, is not counted, and what activation
            checkpointing computes again is.

    Attributes:
        available_flops: operations per second that the device could do; None if that is not known.

    Raises:
        ValueError: if ``window_size`` is less than 2.
        RuntimeError: when a run begins, if the Trainer has no logger.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        window_size: int = 100,
        separator: str = "/",
        measure_flops: bool = True,
    ) -> None:
        require_int("window_size", window_size, least=2)
        for name, function in (
            ("batch_size_fn", batch_size_fn),
            ("length_fn", length_fn),
        ):
            is_function = function is None or callable(function)
            require(is_function, name, "a function of the batch, or None", function)
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.window_size = window_size
        self.separator = separator
        self.measure_flops = measure_flops
        self.available_flops: float | None = None
        # The stage that runs, and the training, which a validation interrupts.
        self._stage: _Stage | None = None
        self._training: _Stage | None = None
        self._counter: FlopCount | None = None
        # By stage, as measured.
        self._flops_per_sample: dict[str, float] = {}
        self._finds_tokens = False
        self._validation_start = 0.0

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not trainer.loggers:
            raise RuntimeError(
                "ThroughputMonitor needs a logger: Trainer(logger=...) must not be False"
            )
        precision = trainer.engine.precision
        dtype = precision.compute or precision.parameters or torch.float32
        self.available_flops = available_flops(trainer.strategy.device, dtype)
        self._stage = self._training = None
        self._flops_per_sample = {}

    def state_dict(self) -> dict[str, Any]:
        # A run that resumes does not count again: it must compute the batch there as the whole run does.
        return {"flops_per_sample": self._flops_per_sample}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._flops_per_sample = dict(state_dict["flops_per_sample"])

    # Counting.

    def _start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        name = str(trainer.state.stage)
        measured = self._flops_per_sample.get(name)
        tells = hasattr(pl_module, "flops_per_batch")
        must_measure = self.measure_flops and not tells and measured is None
        stage = _Stage(name, perf_counter(), must_measure, tells, measured or 0.0)
        stage.logged_step = trainer.global_step
        self._stage = stage

    def _batch_start(
        self, trainer: Trainer, pl_module: Module, *_: Any, **__: Any
    ) -> None:
        stage = self._stage
        if stage is not None and stage.must_measure and self._counter is None:
            self._counter = FlopCount()

    def _stop_counting(self) -> float | None:
        """Take the counter off; returns how many operations it has seen, or None if there was none."""
        counter = self._counter
        self._counter = None
        return None if counter is None else counter.close()

    def _add(
        self, trainer: Trainer, pl_module: Module, stage: _Stage, batch: Any
    ) -> None:
        """Count a batch that has just been run."""
        samples = self._samples_in(trainer, batch)
        if stage.must_measure:
            flops = self._stop_counting() or 0.0
            stage.must_measure = False
            stage.flops_per_sample = flops / float(samples)
            self._flops_per_sample[stage.name] = stage.flops_per_sample
        counts = stage.counts
        counts.batches += 1
        counts.samples += samples
        counts.items += self._items_in(batch)
        counts.flops += stage.flops_per_sample * samples
        if stage.tells_flops:
            # An attribute that a user defines; it may change.
            told: Any = pl_module.flops_per_batch
            counts.flops += told or 0.0
        if counts.batches == 1:
            # Rates are taken from here on: the first batch is slower.
            self._mark(trainer, stage)

    def _samples_in(self, trainer: Trainer, batch: Any) -> Any:
        if self.batch_size_fn is not None:
            return self.batch_size_fn(batch)
        try:
            return trainer.batch_size_of(batch)
        except ValueError as error:
            raise ValueError(
                f"ThroughputMonitor cannot tell how many samples there are: {error}; pass batch_size_fn=…"
            ) from error

    def _items_in(self, batch: Any) -> Any:
        if self.length_fn is not None:
            return self.length_fn(batch)
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        self._finds_tokens = isinstance(tokens, torch.Tensor)
        return tokens.numel() if isinstance(tokens, torch.Tensor) else 0

    def _mark(self, trainer: Trainer, stage: _Stage) -> None:
        """Note the counts, when the device has done what was counted. A host–device sync."""
        device = trainer.strategy.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        counts = stage.counts
        counts.seconds = perf_counter() - stage.start
        counts.steps = trainer.global_step
        counts.samples = int(counts.samples)
        counts.items = int(counts.items)
        marks = stage.marks
        marks.append(replace(counts))
        while len(marks) > 2 and self._spans_window(marks[1], counts):
            marks.popleft()

    def _spans_window(self, first: _Counts, last: _Counts) -> bool:
        return last.batches - first.batches >= self.window_size - 1

    # Rows.

    def _log(self, trainer: Trainer, stage: _Stage) -> None:
        self._mark(trainer, stage)
        begin = f"{stage.name}{self.separator}"
        values = self._values(trainer, stage)
        trainer.log_row({f"{begin}{name}": value for name, value in values.items()})

    def _values(self, trainer: Trainer, stage: _Stage) -> dict[str, float]:
        first = stage.marks[0]
        last = stage.marks[-1]
        values = {
            "time": last.seconds,
            "batches": last.batches,
            "samples": last.samples,
        }
        if last.items:
            values["lengths"] = last.items
        seconds = last.seconds - first.seconds
        if not self._spans_window(first, last) or seconds <= 0:
            return values
        items = "tokens_per_sec" if self._finds_tokens else "items_per_sec"
        rates = {
            "batches_per_sec": (last.batches - first.batches) / seconds,
            "samples_per_sec": (last.samples - first.samples) / seconds,
            items: (last.items - first.items) / seconds,
            "flops_per_sec": (last.flops - first.flops) / seconds,
        }
        device = f"device{self.separator}"
        # Processes of one tensor-parallel group work on the same batches.
        groups = trainer.world_size // trainer.strategy.tensor_parallel_size
        for name, rate in rates.items():
            if not rate:
                continue
            values[f"{device}{name}"] = rate
            if trainer.world_size > 1:
                values[name] = rate * groups
        if last.steps > first.steps:
            values["steps_per_sec"] = (last.steps - first.steps) / seconds
        if self.available_flops and rates["flops_per_sec"]:
            values[f"{device}mfu"] = rates["flops_per_sec"] / self.available_flops
        return values

    # Training.

    on_train_batch_start = _batch_start

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start(trainer, pl_module)
        self._training = self._stage

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        stage = self._stage
        if stage is None:
            return
        self._add(trainer, pl_module, stage, batch)
        step = trainer.global_step
        is_due = step % trainer.log_every_n_steps == 0 and not trainer.window_is_open
        if is_due and step > stage.logged_step:
            stage.logged_step = step
            self._log(trainer, stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        # Where another callback has ended the epoch with its first batch.
        self._stop_counting()

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        self._stop_counting()

    # Evaluation.

    on_test_start = on_predict_start = _start
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        _batch_start
    )

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._validation_start = perf_counter()
        self._start(trainer, pl_module)

    def _batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._stage is not None:
            self._add(trainer, pl_module, self._stage, batch)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _batch_end

    def _end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._stage is not None and self._stage.counts.batches:
            self._log(trainer, self._stage)

    on_test_end = on_predict_end = _end

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module)
        self._stage = self._training
        if self._training is not None:
            self._training.start += perf_counter() - self._validation_start
