"""What is measured of each training by default: gradients, learning rates, speed, memory, and waiting for data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...callbacks.lr_monitor import groups_by_name, optimizers_by_name
from ...callbacks.peak_flops import available_flops
from ...callbacks.throughput_monitor import FlopCount, ThroughputMonitor
from ...strategies.launch.machine import usable_cpus
from ..data.batches import batch_size_of
from ..data.iteration import INFINITE, NO_BATCH
from ..data.shard_detection import data_parallel_rank_and_size
from ..messages import log
from ..metrics.values import as_floats
from .clock import PHASES, Clock

if TYPE_CHECKING:
    from ..loop.run import Run

try:
    import resource
except ImportError:
    # Windows has none.
    resource = None

PREFIX = "monitor/"

# A fit that waits for its data for more than this part of its time is told so, after so many batches and seconds.
MOST_WAITING = 0.1
LEAST_BATCHES = 50
LEAST_SECONDS = 10.0


@dataclass(frozen=True)
class _Mark:
    """How far a fit had come when a row was written."""

    time: float
    step: int
    samples: int
    tokens: float
    seconds: dict[str, float]


class Monitors:
    """Measures one fit.

    Args:
        run: the fit.
        clock: knows where its time goes.
        flops_per_sample: as an earlier attempt has counted them; else they are counted in the first batch.

    Attributes:
        flops_per_sample: floating-point operations of a training step, its backward included; None if not known.
        first_batch: seconds from the training's begin until its first batch was trained on; 0 before.
    """

    def __init__(
        self, run: Run, clock: Clock, flops_per_sample: float | None = None
    ) -> None:
        self._run = run
        self._clock = clock
        self.flops_per_sample = flops_per_sample
        self._must_count = flops_per_sample is None and can_count_flops(run)
        self._counter: FlopCount | None = None
        precision = run.engine.precision
        dtype = precision.compute or precision.parameters or torch.float32
        self._peak = available_flops(run.engine.device, dtype)
        self._tells_utilization = run.engine.device.type == "cuda" and has_nvml()
        self._batches = 0
        self._samples = 0
        self._tokens = 0
        self._count_samples = self._count_tokens = _cannot_count
        # When the last row was written.
        self._last = _Mark(perf_counter(), run.state.global_step, 0, 0, clock.now())
        # The optimizer step before the one whose row is next.
        self._next_row: int | float = 0
        self._rates: dict[str, Any] = {}
        self._has_told = False
        self.first_batch = 0.0

    def begin_anew(self) -> None:
        """The run has gone back to an earlier step: measure from here on."""
        self._last = _Mark(
            perf_counter(),
            self._run.state.global_step,
            self._samples,
            self._count_all_tokens(),
            self._clock.now(),
        )
        self._next_row = 0
        self._rates = {}

    # Each step.

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give the same batches: waiting for one is a phase, and what follows until the next one is a step."""
        switch = self._clock.switch
        state = self._run.state
        try:
            while True:
                switch("data_wait")
                batch = next(batches, NO_BATCH)
                if batch is NO_BATCH:
                    return
                if state.global_step >= self._next_row:
                    self._look_before_step()
                switch("step")
                yield batch
        finally:
            switch("other")
            self.close()

    def close(self) -> None:
        """Stop counting operations, if the first batch has not come to its end."""
        self._stop_counting()

    def _stop_counting(self) -> float:
        """Take the counter off; returns how many operations it has seen."""
        counter = self._counter
        self._counter = None
        return 0.0 if counter is None else counter.close()

    def after_step(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is over, and the callbacks' hooks come: count its batch."""
        self._clock.switch("callbacks")
        self._batches += 1
        try:
            self._samples += self._count_samples(batch)
            self._tokens += self._count_tokens(batch)
        except Exception:
            # The first batch, or one of another kind.
            self._choose_counters(batch)

    def _choose_counters(self, batch: Any) -> None:
        """Find out how the samples and tokens of such a batch are counted in less than a microsecond."""
        flops = self._stop_counting()
        if not self.first_batch:
            self.first_batch = perf_counter() - self._last.time
        if batch is None:
            # It was left out.
            return
        self._count_samples, self._count_tokens = counters(batch)
        samples = 0
        with suppress(Exception):
            samples = self._count_samples(batch)
            self._tokens += self._count_tokens(batch)
        self._samples += samples
        if flops and samples:
            self.flops_per_sample = flops / samples

    def _look_before_step(self) -> None:
        """Note the learning rates with which the step is taken whose row is written next; count the first batch."""
        if self._must_count:
            self._must_count = False
            self._counter = FlopCount()
        every = self._run.trainer.log_every_n_steps
        step = self._run.state.global_step
        self._rates = rates(self._run)
        self._next_row = (
            step + every - step % every - 1 if every != INFINITE else INFINITE
        )

    # Each row.

    def row(self) -> dict[str, Any]:
        """What is measured, when a step has just been taken; on all ranks, as some have parts of the gradients."""
        run = self._run
        is_main = run.trainer.is_global_zero
        if not is_main and not run.engine.strategy.capabilities.shards_state:
            return {}
        norm = gradient_norm(run)
        if not is_main:
            return {}
        values: dict[str, Any] = dict(self._rates or rates(run))
        if norm is not None:
            values["grad_norm"] = norm
        values |= self._speed()
        values["memory"] = peak_memory(run.engine.device)
        if self._tells_utilization:
            with suppress(Exception):
                # Of whatever NVIDIA's library does not tell here.
                values["utilization"] = torch.cuda.utilization(run.engine.device) / 100
        self._tell_of_waiting()
        return {f"{PREFIX}{name}": value for name, value in as_floats(values).items()}

    def _speed(self) -> dict[str, float]:
        """Rates since the last row, of all processes, and the parts of the time that each phase had."""
        now = _Mark(
            perf_counter(),
            self._run.state.global_step,
            self._samples,
            self._count_all_tokens(),
            self._clock.now(),
        )
        last = self._last
        self._last = now
        seconds = now.time - last.time
        if seconds <= 0:
            return {}
        _, shards = data_parallel_rank_and_size(self._run.engine.strategy)
        values = {
            phase: (now.seconds[phase] - last.seconds[phase]) / seconds
            for phase in PHASES
        }
        # What is no training does not count.
        trained = seconds - sum(
            now.seconds[phase] - last.seconds[phase]
            for phase in ("validation", "checkpoint")
        )
        values["steps_per_second"] = (now.step - last.step) / trained
        if now.samples > last.samples:
            values["samples_per_second"] = (
                (now.samples - last.samples) * shards / trained
            )
        if now.tokens > last.tokens:
            values["tokens_per_second"] = (now.tokens - last.tokens) / trained
        if self.flops_per_sample and "samples_per_second" in values:
            flops = self.flops_per_sample * values["samples_per_second"]
            values["flops_per_second"] = flops
            if self._peak:
                values["mfu"] = flops / (self._peak * shards)
        return values

    def _count_all_tokens(self) -> float:
        """Tokens of all processes: those that the step has counted, or else those in the batches."""
        counted = self._run.state.tokens
        if counted.is_counted:
            # A host–device sync, of which the row has one anyway.
            return float(counted.total)
        _, shards = data_parallel_rank_and_size(self._run.engine.strategy)
        return self._tokens * shards

    def _tell_of_waiting(self) -> None:
        """Say once that the loop waits for its data."""
        seconds = self._clock.seconds
        waited = seconds["data_wait"]
        worked = seconds["step"] + seconds["callbacks"] + seconds["transfer"]
        total = waited + worked
        if self._has_told or self._batches < LEAST_BATCHES or total < LEAST_SECONDS:
            return
        if waited < MOST_WAITING * total:
            return
        self._has_told = True
        log.warning(
            "The loop waited for data for %.0f %% of its time; %s",
            100 * waited / total,
            advice(
                self._run.trainer.train_dataloader,
                waited,
                worked,
                max(1, usable_cpus() // self._run.trainer.num_devices),
            ),
        )


def can_count_flops(run: Run) -> bool:
    """Whether the operations of a batch can be counted without a change of what it computes.

    A compiled part would run uncompiled meanwhile; with parameters in shards, each rank has a part of the operations.
    """
    if run.engine.strategy.name not in ("single", "ddp") or run.trainer.compile:
        return False
    hooks: list[Any] = list(run.hooks.on_train_batch_start)
    # A function that was set on an object has no owner.
    owners = [getattr(getattr(hook, "func", hook), "__self__", None) for hook in hooks]
    if not all(map(_enters_no_mode, owners)):
        return False
    # Functions may be compiled, too, which nobody can find in a module.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(frames, "cached_backends", {}).values()
    if any(backend is not None for backend in backends):
        return False
    return not any(
        type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        for part in run.module.modules()
    )


def _enters_no_mode(owner: Any) -> bool:
    """Whether nothing is entered in a hook before the step, and left after it: it would not be inside of the counter.

    Args:
        owner: whose hook it is. Those of others may do so, and so does the monitor that counts by itself.
    """
    is_ours = type(owner).__module__.startswith("loopwright.callbacks.")
    return is_ours and not isinstance(owner, ThroughputMonitor)


def has_nvml() -> bool:
    """Whether there is what tells how busy a GPU is."""
    return find_spec("pynvml") is not None


def rates(run: Run) -> dict[str, Any]:
    """The learning rates by name, as ``lr/AdamW``."""
    try:
        found = {
            key: group["lr"]
            for name, optimizer, _ in optimizers_by_name(run.trainer)
            for key, group in groups_by_name(name, optimizer)
        }
    except (ValueError, AttributeError, KeyError):
        # Groups of one name, or an optimizer of another make.
        return {}
    return {
        # Schedulers change a tensor in place.
        f"lr/{name.removeprefix('lr-')}": rate.clone()
        if isinstance(rate, Tensor)
        else rate
        for name, rate in found.items()
    }


def gradient_norm(run: Run) -> Tensor | None:
    """The norm of the gradients of the last step, before they were clipped; under some strategies a collective."""
    engine = run.engine
    clipped = engine.accumulation.gradient_norm
    if len(run.trainer.optimizers) == 1 and clipped is not None:
        return clipped
    try:
        return engine.strategy.gradient_norm(run.module.parameters())
    except (RuntimeError, NotImplementedError, TypeError):
        # Gradients on several devices, or of a kind that has no norm.
        return None


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has had until now, in bytes: of its device, or else of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB.
    return float(peak if sys.platform == "darwin" else peak * 1024)


Count = Callable[[Any], int]


def counters(batch: Any) -> tuple[Count, Count]:
    """What counts the samples and the tokens of batches like this one.

    Tokens are the elements of ``"input_ids"``, padding included.
    """
    if isinstance(batch, Tensor) and batch.dim():
        return lambda batch: batch.size(0), _no_tokens
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        if isinstance(first, Tensor) and first.dim():
            return lambda batch: batch[0].size(0), _no_tokens
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim():
            return lambda batch: batch["input_ids"].size(0), _count_ids
        tensors = [
            key
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.dim()
        ]
        if tensors:
            first_key = tensors[0]
            return lambda batch: batch[first_key].size(0), _no_tokens
    try:
        batch_size_of(batch)
    except ValueError:
        # It has none that can be told.
        return _no_tokens, _no_tokens
    return batch_size_of, _no_tokens


def _no_tokens(batch: Any) -> int:
    return 0


def _count_ids(batch: Any) -> int:
    return batch["input_ids"].numel()


def _cannot_count(batch: Any) -> int:
    raise TypeError("no batch has come yet")


def advice(loader: Any, waited: float, worked: float, cpus: int) -> str:
    """What to try where the loop waits for its data.

    Args:
        loader: the training loader.
        waited: seconds of waiting for it.
        worked: seconds of all else.
        cpus: those of this process: each process of a machine has its own workers.
    """
    workers = getattr(loader, "num_workers", None)
    if not isinstance(workers, int):
        return "put the loader into a DataLoader with num_workers, which make batches meanwhile"
    # As many as make batches as fast as steps take them; without workers, the loop makes them itself.
    needed = math.ceil(waited / max(worked, 1e-9))
    if workers:
        needed = math.ceil(workers * (waited + worked) / max(worked, 1e-9))
    wanted = max(1, min(needed, cpus))
    if wanted > workers:
        return f"try num_workers={wanted} (it is {workers})"
    return (
        f"with num_workers={workers} and {cpus} CPUs, more workers will not help: make a batch's work less, such as by "
        "preparing the data beforehand"
    )
