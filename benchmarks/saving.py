"""How long a save of 400 MB holds a training up, and how much of the host's memory it takes.

The state are the weights and AdamW's, 133 MB each. Loopwright's loop is held up for a copy to the host's memory, and
the rest is written beside the next steps; for the others a save is over when the call returns. One host copy is what it
takes to clone the tensors once, into fresh memory. Memory is the highest resident size during a save, over that before.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .contenders import installed, title
from .report import Table, verdict

BYTES = 4 * 3 * 16 * 1440 * 1440  # of the state: 398 MB
LIMIT_STALL, LIMIT_MEMORY = (
    1.5,
    1.05,
)  # host copies: of time, of memory (beside JSON and what Python itself takes)


class Steps:
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(1440, 1440, bias=False) for _ in range(16))
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Plain(Steps, nn.Module):
    pass


class Watch:
    """The highest resident memory while it is entered, over that before, in bytes."""

    def __enter__(self) -> Watch:
        self.before = self.highest = self._resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def taken(self) -> int:
        return self.highest - self.before

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.highest = max(self.highest, self._resident())

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()
    ]
    return [*(parameter.detach() for parameter in module.parameters()), *states]


def measure_copy() -> float:
    """Seconds to copy the state once. A second copy in this process might go where the first was, which is quicker."""
    module = Plain()
    optimizer = module.configure_optimizers()
    module.training_step(torch.ones(1, 1440), 0).backward()
    optimizer.step()
    began = time.perf_counter()
    copies = [tensor.clone() for tensor in state_of(module, optimizer)]
    seconds = time.perf_counter() - began
    del copies
    return seconds


def raw(folder: Path) -> tuple[float, float, int]:
    module = Plain()
    optimizer = module.configure_optimizers()
    module.training_step(torch.ones(1, 1440), 0).backward()
    optimizer.step()
    with Watch() as memory:
        began = time.perf_counter()
        torch.save(
            {"module": module.state_dict(), "optimizer": optimizer.state_dict()},
            folder / "raw.pt",
        )
        seconds = time.perf_counter() - began
    return seconds, seconds, memory.taken


def fitted(trainer_class: Any, module_class: type, folder: Path) -> Any:
    trainer = trainer_class(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module_class(), DataLoader(torch.ones(1, 1440)))
    return trainer


def loopwright(folder: Path) -> tuple[float, float, int]:
    from loopwright.framework import Module, Trainer

    trainer = fitted(Trainer, type("Ours", (Steps, Module), {}), folder)
    with Watch() as memory:
        began = time.perf_counter()
        save = trainer.checkpoints.save(str(folder / "a.ckpt"))
        stalled = time.perf_counter() - began
        save.finish()
        seconds = time.perf_counter() - began
    return stalled, seconds, memory.taken


def lightning(folder: Path) -> tuple[float, float, int]:
    from lightning.pytorch import LightningModule, Trainer

    trainer = fitted(Trainer, type("Theirs", (Steps, LightningModule), {}), folder)
    with Watch() as memory:
        began = time.perf_counter()
        trainer.save_checkpoint(folder / "a.ckpt")
        seconds = time.perf_counter() - began
    return seconds, seconds, memory.taken


SAVERS: dict[str, Callable[[Path], tuple[float, float, int]]] = {
    "raw": raw,
    "loopwright": loopwright,
    "lightning": lightning,
}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Memory that another contender has left free would count for nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_quietly, (function, args))


def _quietly(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return function(*args)


def save_in_folder(name: str) -> tuple[float, float, int]:
    with tempfile.TemporaryDirectory() as folder:
        return SAVERS[name](Path(folder))


def compare(rounds: int) -> Table:
    copy = statistics.median(in_fresh_process(measure_copy) for _ in range(rounds))
    rows = [["one host copy", f"{copy:.2f}", "1.0", "", "", "", "1.00", "", ""]]
    figures: dict[str, Any] = {"copy": copy}
    for name in SAVERS:
        if name != "raw" and name not in installed():
            continue
        found = figures[name] = [
            in_fresh_process(save_in_folder, name) for _ in range(rounds)
        ]
        stalled, seconds, taken = (
            statistics.median(column) for column in zip(*found, strict=True)
        )
        ours = name == "loopwright"
        stall, memory = stalled / copy, taken / BYTES
        rows.append([
            "`torch.save`" if name == "raw" else title(name),
            f"{stalled:.2f}", f"{stall:.1f}", *verdict(stall, LIMIT_STALL if ours else None),
            f"{seconds:.2f}", f"{memory:.2f}", *verdict(memory, LIMIT_MEMORY if ours else None),
        ])  # fmt: skip
    header = (
        "",
        "stall, s",
        "in copies",
        "target",
        "",
        "complete, s",
        "memory, in copies",
        "target",
        "",
    )
    return Table(
        "Saving 400 MB while the training goes on",
        header,
        rows,
        figures,
        [f"Medians of {rounds}, each in a process."],
    )
