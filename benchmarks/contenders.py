"""The same work for everybody: a linear layer, SGD, batches of four. One function for each contender.

What the user writes is `Steps`, and it is the same for all; around it stands what each contender asks for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LOG_EVERY = 50  # steps; the default of Loopwright and of Lightning


@dataclass
class Work:
    """What to run: one epoch of `steps` batches."""

    steps: int
    full: bool  # with TensorBoard, progress bar and checkpoints, and a value logged in each step; else with none
    folder: str  # for logs and checkpoints
    probes: dict[int, Callable[[], None]] = field(
        default_factory=dict
    )  # by batch index, called in training_step

    def loader(self) -> DataLoader[Any]:
        x, y = torch.randn(4 * self.steps, 32), torch.randn(4 * self.steps, 2)
        return DataLoader(TensorDataset(x, y), batch_size=4)


class Steps:
    """The user's code, to be mixed into each contender's own kind of module."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.full, self.probes = work.full, work.probes

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx in self.probes:
            self.probes[batch_idx]()
        x, y = batch
        loss = nn.functional.mse_loss(self.layer(x), y)
        if self.full:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Plain(Steps, nn.Module):
    """For contenders without a module class of their own. Their loops log what the step returns."""

    def log(self, name: str, value: torch.Tensor, prog_bar: bool = False) -> None:
        pass


def run_raw(work: Work) -> None:
    """The loop that anybody would write. It shows and saves nothing, whatever the work says."""
    module = Plain(work)
    optimizer = module.configure_optimizers()
    for batch_idx, batch in enumerate(work.loader()):
        loss = module.training_step(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_loopwright(work: Work, callbacks: list[Any] | None = None) -> None:
    from loopwright.framework import Module, Trainer

    class Ours(Steps, Module):
        pass

    options: dict[str, Any] = (
        {"default_root_dir": work.folder, "callbacks": callbacks}
        if work.full
        else {"barebones": True}
    )
    Trainer(accelerator="cpu", devices=1, max_epochs=1, **options).fit(
        Ours(work), work.loader()
    )


def run_monitored(work: Work) -> None:
    """All that measures a run, beside what is there by default."""
    from loopwright.callbacks import (
        DeviceStatsMonitor,
        GarbageCollection,
        LearningRateMonitor,
        ThroughputMonitor,
    )

    run_loopwright(
        work,
        [
            DeviceStatsMonitor(),
            GarbageCollection(),
            LearningRateMonitor(),
            ThroughputMonitor(),
        ],
    )


def run_engine(work: Work) -> None:
    from loopwright.framework import Engine

    logger = None
    if work.full:
        from loopwright.loggers import TensorBoardLogger

        logger = TensorBoardLogger(work.folder)
    engine = Engine(accelerator="cpu", devices=1, logger=logger)
    module = Plain(work)
    module, optimizer, batches = engine.prepare(
        module, module.configure_optimizers(), work.loader()
    )
    if work.full:
        from tqdm import tqdm

        bar = batches = tqdm(batches)
    for batch_idx, batch in enumerate(batches):
        with engine.accumulate(module):
            loss = module.training_step(batch, batch_idx)
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if work.full and (batch_idx + 1) % LOG_EVERY == 0:
            value = loss.item()
            engine.log({"loss": value}, step=batch_idx + 1)
            bar.set_postfix(loss=value, refresh=False)
    engine.end_training()


def run_lightning(work: Work) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Theirs(Steps, LightningModule):
        pass

    options: dict[str, Any] = (
        {"default_root_dir": work.folder} if work.full else {"barebones": True}
    )
    Trainer(accelerator="cpu", devices=1, max_epochs=1, **options).fit(
        Theirs(work), work.loader()
    )


def run_accelerate(work: Work) -> None:
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(
        cpu=True, log_with="tensorboard" if work.full else None, project_dir=work.folder
    )
    accelerator.init_trackers("benchmark")
    module = Plain(work)
    module, optimizer, batches = accelerator.prepare(
        module, module.configure_optimizers(), work.loader()
    )
    bar = batches = tqdm(batches) if work.full else batches
    for batch_idx, batch in enumerate(batches):
        loss = module.training_step(batch, batch_idx)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if work.full and (batch_idx + 1) % LOG_EVERY == 0:
            value = loss.item()
            accelerator.log({"loss": value}, step=batch_idx + 1)
            bar.set_postfix(loss=value, refresh=False)
    accelerator.end_training()


def run_ignite(work: Work) -> None:
    from ignite.engine import Engine, Events

    module = Plain(work)
    optimizer = module.configure_optimizers()

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        loss = module.training_step(batch, engine.state.iteration - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    engine = Engine(step)
    if not work.full:
        engine.run(work.loader(), max_epochs=1)
        return

    from ignite.handlers import ProgressBar, TensorboardLogger

    def values(loss: torch.Tensor) -> dict[str, float]:
        return {"loss": loss.item()}

    due = Events.ITERATION_COMPLETED(every=LOG_EVERY)
    ProgressBar().attach(engine, output_transform=values)
    with TensorboardLogger(log_dir=work.folder) as logger:
        logger.attach_output_handler(
            engine, due, tag="training", output_transform=values
        )
        engine.run(work.loader(), max_epochs=1)


RUN: dict[str, Callable[[Work], None]] = {
    "raw": run_raw,
    "loopwright": run_loopwright,
    "monitored": run_monitored,
    "engine": run_engine,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "ignite": run_ignite,
}
OURS = ("raw", "loopwright", "monitored", "engine")
# What differs from another contender only where nothing is switched off.
FULL_ONLY = ("monitored",)
DISTRIBUTIONS = {
    "lightning": "lightning",
    "accelerate": "accelerate",
    "ignite": "pytorch-ignite",
}


def installed(full: bool = False) -> list[str]:
    """The contenders that can run here."""
    return [
        name
        for name in RUN
        if (name in OURS or find_spec(name) is not None)
        and (full or name not in FULL_ONLY)
    ]


def missing() -> list[str]:
    return [name for name in RUN if name not in installed(full=True)]


def title(name: str) -> str:
    """How a contender is called in a table."""
    if name in DISTRIBUTIONS:
        return f"{name.capitalize()} {version(DISTRIBUTIONS[name])}"
    return {
        "raw": "raw loop",
        "loopwright": "Loopwright",
        "monitored": "Loopwright, with all monitors",
        "engine": "Loopwright's Engine",
    }[name]


def settle() -> None:
    """One thread, one seed, and no messages, for the whole process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
