"""Whether a training that is killed again and again ends as one that is not: `python -m benchmarks kills --kills 200`.

A training of one process, of two or of three saves a checkpoint every 3 steps. It is killed by SIGKILL at a random
moment, the saving of a checkpoint among them, and started again with `ckpt_path="last"`, until it gets to its end. Then
its weights must be those of an undisturbed run to the last bit, and its log must hold the same rows. Then the next one
begins.

The processes are forked from one that has imported everything, so that starting them takes little of the time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.loggers import CSVLogger

from .forked import fork_ranks, wait
from .report import Table

EPOCHS, BATCHES = 4, 24


class Noisy(Dataset):
    """With random augmentation."""

    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 32, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] + 0.1 * torch.randn(32)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 1024),
            nn.BatchNorm1d(1024),
            nn.Dropout(0.3),
            nn.Linear(1024, 32),
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.flip(1)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9),
                "interval": "step",
            }
        ]


class Began(Callback):
    """Tells the process that waits for it that the loop has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        if trainer.is_global_zero:
            os.write(self.pipe, b".")


def train(folder: Path, pipe: int) -> None:
    seed_everything(3, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=CSVLogger(folder / "logs"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(folder / "steps", every_n_train_steps=3, save_last=True),
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2),
            EarlyStopping("val_loss", patience=50),
            Began(pipe),
        ],
    )
    samples = 8 * BATCHES * trainer.world_size
    loaders = DataLoader(Noisy(samples), 8, shuffle=True), DataLoader(Noisy(32), 8)
    trainer.fit(Net(), *loaders, ckpt_path="last")
    trainer.save_checkpoint(folder / "end.ckpt")


@dataclass
class Outcome:
    """What came of the killed trainings."""

    kills: int = 0
    trainings: int = 0  # that came to their end
    left_unfinished: int = 0  # kills that left a checkpoint half-written


@dataclass
class Training:
    """The processes of a training, and where its main one tells that the loop has begun."""

    folder: Path
    processes: list[int]
    pipe: int

    def wait_for_its_loop(self) -> bool:
        """False if it ended before."""
        with os.fdopen(self.pipe, "rb") as pipe:
            return pipe.read(1) == b"."

    def failed(self, what: str) -> RuntimeError:
        told = "\n".join(
            path.read_text()[-3000:] for path in sorted(self.folder.glob("rank-*.txt"))
        )
        return RuntimeError(f"{self.folder}: {what}\n{told}")


def start(folder: Path, ranks: int) -> Training:
    """Fork the processes of a training."""
    reads, writes = os.pipe()
    processes = fork_ranks(ranks, folder, partial(train, folder, writes))
    os.close(writes)
    return Training(folder, processes, reads)


def finish(training: Training) -> None:
    """Let a training come to its end."""
    training.wait_for_its_loop()
    if any(statuses := wait(training.processes)):
        raise training.failed(f"nobody killed it, and it ended with {statuses}")


def content(folder: Path, file: Path) -> Any:
    """What is in a file of a checkpoint, without the folder that callbacks know."""
    if file.suffix == ".safetensors":
        return sorted(
            (name.replace(str(folder), ""), tensor.tolist())
            for name, tensor in load_file(file).items()
        )
    values = json.loads(file.read_text().replace(str(folder), ""))
    for callback in (
        values.get("callbacks", {}).values() if isinstance(values, dict) else ()
    ):
        callback.pop(
            "removable", None
        )  # what a training was resumed from is kept until it has ended
    for logger in values.get("loggers", ()) if isinstance(values, dict) else ():
        logger.pop(
            "version", None
        )  # one that was killed before its first checkpoint has left another version
    return values


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        return [
            text
            for key in keys
            for text in differences(ours.get(key), theirs.get(key), f"{path}/{key}")
        ]
    return [] if ours == theirs else [f"{path}: {ours!r:.300} and {theirs!r:.300}"]


def newest_log(folder: Path) -> Path:
    return max(
        (folder / "logs").rglob("metrics.csv"),
        key=lambda path: int(path.parent.name.rpartition("_")[2]),
    )


def ended_as(folder: Path, whole: Path) -> None:
    """Compare what two trainings have left.

    Raises:
        RuntimeError: if it is not the same.
    """
    for file in sorted(
        path.relative_to(whole / "end.ckpt")
        for path in (whole / "end.ckpt").rglob("*.*")
    ):
        if file.name == "manifest.json":  # which knows when it was written
            continue
        ours, theirs = (
            content(path, path / "end.ckpt" / file) for path in (folder, whole)
        )
        if ours != theirs:
            raise RuntimeError(
                f"{folder}: {file} is not that of the undisturbed training: {differences(ours, theirs)}"
            )
    rows = [newest_log(path).read_text() for path in (folder, whole)]
    if rows[0] != rows[1]:
        raise RuntimeError(f"{folder}: the log is not that of the undisturbed training")


def kill(kills: int, ranks: int, folder: Path, seed: int = 0) -> Outcome:
    """Kill trainings of ``ranks`` processes so many times, and complete the last one.

    Raises:
        RuntimeError: if a training does not start again, hangs, or ends otherwise than an undisturbed one.
    """
    draw, outcome = random.Random(seed), Outcome()
    whole = start(folder / "whole", ranks)
    whole.wait_for_its_loop()
    began = time.monotonic()
    if any(statuses := wait(whole.processes)):
        raise whole.failed(f"nobody killed it, and it ended with {statuses}")
    duration = time.monotonic() - began
    while outcome.kills < kills:
        place = folder / f"training-{outcome.trainings}"
        while outcome.kills < kills:
            training = start(place, ranks)
            if training.wait_for_its_loop():
                time.sleep(draw.uniform(0, 0.4) * duration)
            for process in draw.choice(
                [*([process] for process in training.processes), training.processes]
            ):
                os.kill(
                    process, signal.SIGKILL
                )  # a process that has ended is still there until it is waited for
            statuses = wait(training.processes)
            if -signal.SIGKILL not in statuses:
                if any(statuses):
                    raise training.failed(
                        f"nobody killed it, and it ended with {statuses}"
                    )
                break
            outcome.kills += 1
            outcome.left_unfinished += any(place.rglob("*.tmp"))
        else:
            finish(start(place, ranks))
        ended_as(place, folder / "whole")
        outcome.trainings += 1
    return outcome


def compare(kills: int, folder: Path) -> Table:
    rows, figures = [], {}
    for ranks, share in ((1, kills // 3), (2, kills // 3), (3, kills - kills // 3 * 2)):
        outcome = kill(share, ranks, folder / f"{ranks}")
        figures[str(ranks)] = vars(outcome)
        rows.append([str(ranks), *(str(number) for number in vars(outcome).values())])
    return Table(
        "Trainings killed at a random moment",
        ("processes", "kills", "trainings completed", "half-written at the kill"),
        rows,
        figures,
        [
            "Each training went on from its newest complete checkpoint, and ended with the weights, optimizer states, "
            "random generators and log rows of an undisturbed one, bit for bit."
        ],
    )
