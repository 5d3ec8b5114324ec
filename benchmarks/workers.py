"""Whether the workers of loaders start whatever else goes on: `python -m benchmarks workers --starts 10000`.

Two processes train and validate again and again, with one or two forked workers a loader, persistent or not. They meet
in collectives between the starts, whose threads are still busy when the next worker is forked. In every fourth training
a process and its workers get SIGTERM. A worker that does not answer within a minute ends the benchmark with an error.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback
from loopwright.framework import Module, Trainer
from loopwright.strategies.launch.launcher import call_in_processes

from .kills import Noisy
from .report import Table

RANKS, EPOCHS = 2, 2
SECONDS = (
    60  # after which a worker that has not given a batch is taken for one that hangs
)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class CountedLoader(DataLoader):
    """Counts the workers that it has started."""

    started = 0

    def _get_iterator(self) -> Any:
        CountedLoader.started += self.num_workers
        return super()._get_iterator()


class Interrupt(Callback):
    """Sends SIGTERM to its process and the workers, as a scheduler does, once."""

    def on_train_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and batch_idx == 3 and trainer.global_rank == 0:
            for process in (
                os.getpid(),
                *(child.pid for child in multiprocessing.active_children()),
            ):
                os.kill(process, signal.SIGTERM)


def train_often(starts: int) -> list[int]:
    """Train until all ranks together have started so many workers; how many each has started."""
    torch.set_num_threads(1)
    logging.getLogger("loopwright").setLevel(logging.ERROR)
    turn = 0
    while CountedLoader.started * RANKS < starts:
        workers: dict[str, Any] = {
            "num_workers": 1 + turn % 2,
            "persistent_workers": turn % 3 == 0,
            "multiprocessing_context": "fork",
            "timeout": SECONDS,
        }
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            num_sanity_val_steps=turn % 2,
            callbacks=[Interrupt()] if turn % 4 == 0 else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = (
            CountedLoader(Noisy(38), 3, shuffle=True, **workers),
            CountedLoader(Noisy(12), 3, **workers),
        )
        try:
            trainer.fit(Net(), *loaders)
        except SystemExit:
            assert turn % 4 == 0, "nobody has sent a signal"
        turn += 1
    return trainer.strategy.gather_objects(CountedLoader.started)


def compare(starts: int) -> Table:
    began = time.monotonic()
    started = call_in_processes(train_often, (starts,), RANKS)
    seconds = time.monotonic() - began
    row = [str(RANKS), f"{sum(started):,}", "0", f"{seconds:.0f}"]
    return Table(
        "Starts of loaders' workers beside collectives and signals",
        ("processes", "workers started", "that hung", "s"),
        [row],
        {"started": started, "seconds": seconds},
    )
