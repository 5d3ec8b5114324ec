"""What an accelerator's memory was used for when there was no more of it."""

from __future__ import annotations

import os
import pickle
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch

from .arguments import require_int
from .base import Callback
from .profiler import destination

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class MemorySnapshot(Callback):
    """Record what asks for memory on a CUDA device, and write it to a file when a run ends for want of memory.

    The file, ``memory-<stage>-rank<r>.pickle``, is opened by https://pytorch.org/memory_viz, in the browser alone: it
    shows each piece of memory over time, with the lines of code that asked for it. It is a pickle of torch's, so load
    only your own. Recording costs microseconds for each allocation.

    On other devices torch records nothing, which a line says.

    Args:
        dirpath: the folder for the file, a path or an fsspec URL. Default: the Trainer's ``log_dir``.
        max_entries: how many allocations and releases to keep, the last ones.

    Attributes:
        path: the file that was written, or "".

    Raises:
        ValueError: if ``max_entries`` is not an int of at least 1.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        max_entries: int = 100_000,
    ) -> None:
        require_int("max_entries", max_entries, least=1)
        self.dirpath = dirpath
        self.max_entries = max_entries
        self.path = ""
        self._folder = ""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        folder = trainer.log_dir if self.dirpath is None else os.fspath(self.dirpath)
        # Each process alone might choose another version number.
        self._folder = trainer.strategy.broadcast(folder)  # collective
        device = trainer.strategy.device
        if device.type == "cuda":
            # torch documents these functions, in "Understanding CUDA Memory Usage", under names with an underscore.
            torch.cuda.memory._record_memory_history(max_entries=self.max_entries)
        elif trainer.is_global_zero:
            log.info(
                "MemorySnapshot: torch records the memory of CUDA devices only; on %s nothing is recorded",
                device.type,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        device = trainer.strategy.device
        if device.type != "cuda":
            return
        # Some libraries have no class for it.
        is_class = isinstance(exception, torch.OutOfMemoryError)
        if is_class or "out of memory" in str(exception).lower():
            self._write(trainer, device)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, trainer: Trainer, device: torch.device) -> None:
        name = f"memory-{trainer.state.fn}-rank{trainer.global_rank}.pickle"
        self.path = f"{self._folder}/{name}"
        snapshot: Any = torch.cuda.memory._snapshot(device)
        system, plain = destination(self.path)
        with system.open(plain, "wb") as file:
            pickle.dump(snapshot, file)
        gibibytes = torch.cuda.max_memory_allocated(device) / 2**30
        log.warning(
            "MemorySnapshot: out of memory at %.1f GiB; what has asked for it is in %s: open it in "
            "https://pytorch.org/memory_viz",
            gibibytes,
            self.path,
        )

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if trainer.strategy.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
