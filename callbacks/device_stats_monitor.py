"""Log how much of the devices is used."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from .arguments import require_choice
from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer


# Seconds.
_CPU_INTERVAL = 0.1


class DeviceStatsMonitor(Callback):
    """Log the memory that the accelerator has given out, and how busy the CPU is.

    The values stand in the row of the step that ``log_every_n_steps`` logs, measured before and after its batch: their
    names begin with ``DeviceStatsMonitor.on_train_batch_start/`` and ``….on_train_batch_end/``. In a validation or
    test, the first batch is measured, and every ``log_every_n_steps``-th after it. The device is that of the main
    process.

    Of an accelerator they are what torch's allocator counts (``torch.cuda.memory_stats``, in bytes). Of the CPU they
    are ``cpu_percent``, ``cpu_vm_percent`` and ``cpu_swap_percent``, of the whole machine, for which psutil must be
    installed (``pip install 'loopwright[monitors]'``). They are read ten times a second at most, as how busy a CPU is
    in a shorter time says little.

    Args:
        cpu_stats: whether to log the CPU's values; None does so where the run is on the CPU.

    Raises:
        ValueError: if ``cpu_stats`` is none of these.
        RuntimeError: when a run begins, if the Trainer has no logger.
        ImportError: then, if the CPU is asked for and psutil is not installed.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        require_choice("cpu_stats", cpu_stats, True, False, None)
        self._cpu_stats = cpu_stats
        # What was read of the CPU last, and when, on the monotonic clock.
        self._cpu: dict[str, float] = {}
        self._cpu_time = -math.inf

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "predict":
            return
        if not trainer.loggers:
            raise RuntimeError(
                "Cannot use `DeviceStatsMonitor` callback without a logger: Trainer(logger=...) must not be False"
            )
        if self._reads_cpu(trainer.strategy.device):
            cpu_stats()

    def _reads_cpu(self, device: torch.device) -> bool:
        if self._cpu_stats is None:
            return device.type == "cpu"
        return self._cpu_stats

    def _log(self, trainer: Trainer, hook: str, step: int) -> None:
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.device
        stats = accelerator_stats(device)
        if self._reads_cpu(device):
            now = time.monotonic()
            if now - self._cpu_time >= _CPU_INTERVAL:
                self._cpu = cpu_stats()
                self._cpu_time = now
            stats = {**stats, **self._cpu}
        if not stats:
            return
        prefix = f"{type(self).__qualname__}.{hook}/"
        row = {f"{prefix}{name}": value for name, value in stats.items()}
        trainer.log_row({"epoch": trainer.current_epoch, **row}, step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int
    ) -> None:
        # The step that this batch belongs to.
        step = trainer.global_step + 1
        if step % trainer.log_every_n_steps == 0 and not trainer.window_is_open:
            self._log(trainer, "on_train_batch_start", step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and not trainer.window_is_open:
            self._log(trainer, "on_train_batch_end", step)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: Module,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._log_evaluation(trainer, "batch_start", batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._log_evaluation(trainer, "batch_end", batch_idx)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def _log_evaluation(self, trainer: Trainer, moment: str, batch_idx: int) -> None:
        if batch_idx % trainer.log_every_n_steps == 0 and not trainer.sanity_checking:
            stage = "test" if trainer.testing else "validation"
            self._log(trainer, f"on_{stage}_{moment}", trainer.global_step)


def cpu_stats() -> dict[str, float]:
    """How busy the CPUs are since the last call, and how full memory and swap are, in percent.

    Raises:
        ImportError: if psutil is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise ImportError(
            "the CPU's values need psutil, and `psutil` is not installed: pip install 'loopwright[monitors]'; or "
            "DeviceStatsMonitor(cpu_stats=False)"
        ) from error
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


def accelerator_stats(device: torch.device) -> dict[str, float]:
    """What torch counts of an accelerator's memory, in bytes and calls; nothing for a CPU."""
    if device.type == "cpu":
        return {}
    module = torch.get_device_module(device)
    if hasattr(module, "memory_stats"):
        return module.memory_stats(device)
    # Apple's devices.
    names = ("current_allocated_memory", "driver_allocated_memory")
    return {name: getattr(module, name)() for name in names if hasattr(module, name)}
