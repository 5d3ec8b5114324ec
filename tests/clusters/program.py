"""A small training, in the processes that a cluster starts for it; it can be told to go wrong.

``python -m tests.clusters.program FOLDER``. What it writes stands in FOLDER: ``logs/``, ``rank.N`` (its process id),
``steps`` (a line for each step that the main process begins) and, at the end, ``weights.safetensors``. Each step takes
as many seconds more as ``FOLDER/pause`` says, if it is there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.loggers import TensorBoardLogger
from loopwright.strategies import DDPStrategy

NUM_EPOCHS = 2
NUM_SAMPLES = 160
BATCH_SIZE = 4
# With two processes.
NUM_STEPS = NUM_EPOCHS * NUM_SAMPLES // BATCH_SIZE // 2


class Classifier(Module):
    """Two layers with dropout, so that random states count, and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        labels = torch.arange(NUM_SAMPLES) % 2
        inputs = torch.randn(NUM_SAMPLES, 8, generator=generator) + labels[:, None]
        return DataLoader(TensorDataset(inputs, labels), BATCH_SIZE, shuffle=True)


class Scripted(Callback):
    """Notes each step, is as slow as it is told to be, and fails where it is told to.

    Args:
        folder: the job's.
        fail_at: the step at which a process raises; None for none.
        fail_rank: which process.
    """

    def __init__(
        self, folder: Path, fail_at: int | None = None, fail_rank: int = 1
    ) -> None:
        self.folder = folder
        self.fail_at = fail_at
        self.fail_rank = fail_rank

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        (self.folder / f"rank.{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if trainer.is_global_zero:
            with (self.folder / "steps").open("a") as file:
                file.write(f"{step}\n")
        if step == self.fail_at and trainer.global_rank == self.fail_rank:
            raise ValueError("the batch is not to my liking")
        with suppress(FileNotFoundError):
            time.sleep(float((self.folder / "pause").read_text()))


def train(
    folder: Path,
    fail_at: int | None = None,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = "last",
    **options: Any,
) -> None:
    """Train, by default from the newest checkpoint in the folder if there is one."""
    torch.set_num_threads(1)
    seed_everything(5)
    module = Classifier()
    trainer = Trainer(
        accelerator="cpu",
        num_nodes="auto",
        max_epochs=NUM_EPOCHS,
        logger=TensorBoardLogger(folder, name="logs"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Scripted(folder, fail_at),
            ModelCheckpoint(every_n_train_steps=5, save_top_k=-1, save_last=True),
            *callbacks,
        ],
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    trainer.export(folder / "weights.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--timeout", type=float, default=60, help="in seconds")
    parser.add_argument("--hang-timeout", type=float, help="in seconds, of a step")
    parser.add_argument("--fresh", action="store_true", help="no ckpt_path")
    parser.add_argument("--subfolder-of-array-task", action="store_true")
    arguments = parser.parse_args()
    if arguments.subfolder_of_array_task and os.environ["SLURM_ARRAY_TASK_ID"] != "0":
        arguments.folder /= os.environ["SLURM_ARRAY_TASK_ID"]
    train(
        arguments.folder,
        arguments.fail_at,
        ckpt_path=None if arguments.fresh else "last",
        devices=arguments.devices,
        hang_timeout={"train": arguments.hang_timeout or 300},
        strategy=DDPStrategy(timeout=timedelta(seconds=arguments.timeout)),
    )
