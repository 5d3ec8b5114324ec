"""How much memory a resume takes over what the training then holds: `python -m benchmarks resuming`.

FSDP on the CPU, in 2 and in 4 processes; a checkpoint of 1 GB: parameters and AdamW's two moments. Each process reads
of it what it keeps. Memory is the highest resident size while the checkpoint is opened, and while it is loaded, over
that before; the module's part is there then, so that two thirds of the process's share have to come.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Module, Trainer
from loopwright.framework.lifecycle.processes import call_in_processes

from .report import Table, verdict
from .sharded import GIVE_BACK, forget_peak, resident

WIDTH = 2048
LAYERS = 20
WHOLE = 3 * 4 * LAYERS * WIDTH**2
PROCESSES = (2, 4)
LIMIT = 0.05  # of the whole checkpoint


class Large(Module):
    """Notes its memory while it is resumed."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers)
        self.taken: dict[str, int] = {}
        self.before = 0

    def setup(self, stage: str) -> None:
        self.taken["opened"] = resident("VmHWM") - self.before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # By now, the strategy has set up the module.
        self.before = forget_peak()

    def on_train_start(self) -> None:
        self.taken["loaded"] = resident("VmHWM") - self.before

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layers(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def fit(steps: int, ckpt_path: Path | None = None) -> tuple[Large, Trainer]:
    torch.manual_seed(0)
    module = Large()
    trainer = Trainer(
        accelerator="cpu",
        strategy="fsdp",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.before = forget_peak()
    loader = DataLoader(TensorDataset(torch.ones(8, WIDTH)), 1)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def save_and_resume(folder: str) -> list[dict[str, int]]:
    """What each rank took, in bytes."""
    path = Path(folder, "saved.ckpt")
    trained, trainer = fit(1)
    trainer.save_checkpoint(path)
    del trained, trainer
    taken = []
    # The first one imports, and makes what stays.
    for _ in range(2):
        module, trainer = fit(2, path)
        taken = trainer.strategy.gather_objects(module.taken)
        del module, trainer
    return taken


@contextmanager
def giving_back() -> Iterator[None]:
    """Free memory goes back to the system at once, and does not hide what is taken next."""
    name, _, value = GIVE_BACK.partition("=")
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def compare() -> Table:
    rows = []
    figures = {}
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder, giving_back():
            taken = call_in_processes(save_and_resume, (folder,), processes)
        figures[str(processes)] = taken
        opened = max(one["opened"] for one in taken) / WHOLE
        # Of the process's share, the moments come; the parameters are there.
        share = 2 / 3 / processes
        over = max(one["loaded"] for one in taken) / WHOLE - share
        rows.append(
            [
                f"{processes} processes",
                f"{opened:.1%}",
                *verdict(opened, LIMIT),
                f"{over:.1%}",
                *verdict(over, LIMIT),
            ]
        )
    header = (
        "`fsdp`",
        "while it is opened",
        "target",
        "",
        "while it is loaded, over the share",
        "target",
        "",
    )
    title = (
        f"Resuming from a checkpoint of {WHOLE / 1e9:.2f} GB: memory, as parts of it"
    )
    return Table(title, header, rows, figures)
