"""How long it takes to save 100 MB of parameters and AdamW states, and to go on from them.

Saving ends when the contender's call returns. Ours has flushed everything to the disk by then and has taken checksums;
to tell what the flushing is worth, there is a `torch.save` with it as well. Loading reads from the operating system's
cache, and ends when module and optimizer hold the values.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .contenders import installed, title
from .report import Table

Seconds = tuple[float, float]  # to save, to load

BATCHES = DataLoader(torch.ones(1, 2048))  # one step, so that the optimizer has a state


class Steps:
    """A module of 8.4 million parameters: 34 MB, and twice that for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2048, 4096)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Plain(Steps, nn.Module):
    pass


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def raw(folder: Path, flush: bool = False) -> Seconds:
    module = Plain()
    optimizer = module.configure_optimizers()
    module.training_step(next(iter(BATCHES)), 0).backward()
    optimizer.step()
    path = folder / "raw.pt"

    def save() -> None:
        with path.open("wb") as file:
            torch.save(
                {"module": module.state_dict(), "optimizer": optimizer.state_dict()},
                file,
            )
            if flush:
                file.flush()
                os.fsync(file.fileno())

    def load() -> None:
        state = torch.load(path)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])

    return timed(save), timed(load)


def raw_flushed(folder: Path) -> Seconds:
    return raw(folder, flush=True)


def with_trainer(trainer_class: Any, module_class: type, folder: Path) -> Seconds:
    """For Loopwright and Lightning, which are called alike. To resume a finished run is to load and to stop."""
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    path = folder / "trainer.ckpt"
    trainer = trainer_class(**options)
    trainer.fit(module_class(), BATCHES)
    save = timed(trainer.save_checkpoint, path)
    module, trainer = module_class(), trainer_class(**options)
    return save, timed(trainer.fit, module, BATCHES, ckpt_path=path)


def loopwright(folder: Path) -> Seconds:
    from loopwright.framework import Module, Trainer

    return with_trainer(Trainer, type("Ours", (Steps, Module), {}), folder)


def lightning(folder: Path) -> Seconds:
    from lightning.pytorch import LightningModule, Trainer

    return with_trainer(Trainer, type("Theirs", (Steps, LightningModule), {}), folder)


def accelerate(folder: Path) -> Seconds:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = Plain()
    module, optimizer = accelerator.prepare(module, module.configure_optimizers())
    accelerator.backward(module.training_step(next(iter(BATCHES)), 0))
    optimizer.step()
    path = str(folder / "state")
    return timed(accelerator.save_state, path), timed(accelerator.load_state, path)


SAVERS: dict[str, Callable[[Path], Seconds]] = {
    "raw": raw,
    "raw, flushed": raw_flushed,
    "loopwright": loopwright,
    "lightning": lightning,
    "accelerate": accelerate,
}
NAMES = {"raw": "`torch.save`", "raw, flushed": "`torch.save`, flushed to disk"}


def compare(rounds: int) -> Table:
    here = (*NAMES, *installed())
    found: dict[str, list[Seconds]] = {name: [] for name in SAVERS if name in here}
    for _ in range(rounds + 1):  # the first is for imports and caches
        for name, seconds in found.items():
            quiet = (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            )
            with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
                seconds.append(SAVERS[name](Path(folder)))
    rows = []
    for name, seconds in found.items():
        save, load = (
            statistics.median(column) for column in zip(*seconds[1:], strict=True)
        )
        rows.append([NAMES.get(name) or title(name), f"{save:.2f}", f"{load:.2f}"])
    return Table(
        "Saving and loading 100 MB",
        ("", "save, s", "load, s"),
        rows,
        {name: seconds[1:] for name, seconds in found.items()},
        [f"Medians of {rounds}."],
    )
