"""The training in which :mod:`.faults` lets something go wrong: a program as a user would write it.

Run as `python benchmarks/faulty.py SETTINGS`, with a :class:`Settings` in JSON. It trains two epochs of ten steps,
validates after each, and saves every third step.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Module, Trainer, seed_everything

STEPS, BATCH = 10, 4  # optimizer steps in an epoch, samples in a batch of one process
SAVE_EVERY = 3
# The fourth checkpoint is struck: then there are others before it, in both epochs.
STRUCK_SAVE = 12


@dataclass
class Settings:
    """What to train, and what is to go wrong.

    Attributes:
        folder: for all that is written.
        fault: what goes wrong; empty for nothing.
        phase: where.
        rank: in which process.
        strategy: the Trainer's.
        devices: the Trainer's.
        workers: of each loader.
        stream: the training data have no length.
        hang_timeout: the Trainer's; None for its default.
        step_seconds: how long a step takes at least.
    """

    folder: str
    fault: str = ""
    phase: str = ""
    rank: int = 0
    strategy: str = "ddp"
    devices: int | str = 2
    workers: int = 0
    stream: bool = False
    hang_timeout: float | None = None
    step_seconds: float = 0.0


# -- what goes wrong --------------------------------------------------------------------------------------------------


def stop() -> None:
    """Be stopped; the signal may reach another thread first, and this one would go on for a moment."""
    os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()


def spin() -> None:
    while True:
        pass


def block(keep_lock: bool) -> None:
    """Wait for ever in C for a mutex, in which no signal ends the wait; perhaps with Python's lock."""
    library = ctypes.PyDLL(None) if keep_lock else ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def fail() -> None:
    raise ValueError("the fault")


def ask_for_memory() -> None:
    """More than any machine has."""
    torch.empty(1 << 50)


def agent() -> int:
    return int(os.environ.get("LOOPWRIGHT_AGENT", os.getppid()))


WAYS = {
    "raise": fail,
    "callback raises": fail,
    "worker raises": fail,
    "out of memory": ask_for_memory,
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: sys.exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "worker killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": stop,
    "endless loop": spin,
    "sleep": lambda: time.sleep(1e6),
    "blocks in C": lambda: block(keep_lock=False),
    "blocks in C with Python's lock": lambda: block(keep_lock=True),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "agent gets SIGTERM": lambda: os.kill(agent(), signal.SIGTERM),
    "agent gets SIGKILL": lambda: os.kill(agent(), signal.SIGKILL),
}


# What leaves a process no time for a word. Its place is that of its last sign of life, so it is there for a while.
SUDDEN = ("SIGKILL", "exit 0", "SIGSTOP", "blocks in C with Python's lock")
LIFE_SECONDS = 1.2


class Fault:
    """What is to go wrong in this process, once, though the job may be started again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_here = int(os.environ.get("RANK", "0")) == settings.rank

    def is_due(self, phase: str) -> bool:
        return (
            bool(self.settings.fault) and self.is_here and self.settings.phase == phase
        )

    def note(self) -> bool:
        """Note when it happens; False if it has happened before."""
        try:
            with Path(self.settings.folder, "struck").open("x") as file:
                file.write(str(time.time()))
        except FileExistsError:
            return False
        return True

    def strike(self, phase: str) -> None:
        if not (self.is_due(phase) and self.settings.fault in WAYS):
            return
        if self.settings.fault in SUDDEN:
            time.sleep(LIFE_SECONDS)
        if self.note():
            WAYS[self.settings.fault]()

    def strike_in_writing(self) -> None:
        """Let it happen in the thread that writes the fourth checkpoint, when it flushes its first file."""
        flush = os.fsync

        def struck(descriptor: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.strike("write")
            flush(descriptor)

        os.fsync = struck


# -- the training -----------------------------------------------------------------------------------------------------


class Data(Dataset):
    """With random augmentation; a worker that reads them may be struck."""

    def __init__(self, samples: int, fault: Fault, phases: tuple[str, ...]) -> None:
        self.samples, self.fault, self.phases = samples, fault, phases

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if get_worker_info() is not None and self.fault.settings.fault.startswith(
            "worker"
        ):
            is_late = Path(self.fault.settings.folder, "late").exists()
            for phase in self.phases:
                if is_late == (phase != "first"):
                    self.fault.strike(phase)
        return torch.full((8,), index / 80) + 0.1 * torch.randn(8), index % 2


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (
            (torch.full((8,), index / 80), index % 2) for index in range(self.samples)
        )


class Net(Module):
    """Is struck in its hooks."""

    def __init__(self, settings: Settings, fault: Fault) -> None:
        super().__init__()
        self.settings, self.fault = settings, fault
        self.strikes = settings.fault != "callback raises"
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2)
        )

    def strike(self, phase: str) -> None:
        if self.strikes:
            self.fault.strike(phase)
        if (
            self.settings.fault == "other keys"
            and self.fault.is_due(phase)
            and self.fault.note()
        ):
            self.log("other", 1.0, on_epoch=True, batch_size=BATCH)

    def setup(self, stage: str) -> None:
        self.strike("setup")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 0 and batch_idx == 0:
            self.strike("first")
        if self.current_epoch == 1 and batch_idx == 2 and self.fault.is_here:
            Path(self.settings.folder, "late").touch()
        if self.current_epoch == 1 and batch_idx == 4:
            self.strike("mid")
        time.sleep(self.settings.step_seconds)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if (
            self.current_epoch == 1
            and batch_idx == 1
            and not self.trainer.sanity_checking
        ):
            self.strike("validation")
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.global_step >= STRUCK_SAVE:
            self.strike("save")

    def teardown(self, stage: str) -> None:
        self.strike("teardown")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader:
        samples = STEPS * BATCH * self.trainer.world_size
        if self.settings.stream:
            return DataLoader(
                Stream(samples - 28 * self.counts_otherwise("mid")), BATCH
            )
        samples += 4 * BATCH * self.counts_otherwise("first")
        data = Data(samples, self.fault, ("first", "mid"))
        return DataLoader(data, BATCH, shuffle=True, num_workers=self.settings.workers)

    def val_dataloader(self) -> DataLoader:
        samples = 24 + 4 * BATCH * self.counts_otherwise("validation")
        data = Data(samples, self.fault, ("validation",))
        return DataLoader(data, BATCH, num_workers=self.settings.workers)

    def counts_otherwise(self, phase: str) -> bool:
        """Whether this process has another number of batches than the others."""
        is_so = self.settings.fault == "other batches" and self.fault.is_due(phase)
        return is_so and (self.fault.note() or True)


class Struck(Callback):
    """Is struck in its hooks instead of the module."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        self.fault.strike("setup")

    def on_train_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and batch_idx == 0:
            self.fault.strike("first")
        if trainer.current_epoch == 1 and batch_idx == 4:
            self.fault.strike("mid")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            self.fault.strike("validation")

    def on_save_checkpoint(
        self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.global_step >= STRUCK_SAVE:
            self.fault.strike("save")

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        self.fault.strike("teardown")


class StrikeWhileWriting(Callback):
    """Arms the fault when the fourth checkpoint has been copied, and its thread is about to write."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def on_save_checkpoint(
        self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.global_step == STRUCK_SAVE:
            self.fault.strike_in_writing()


def train(settings: Settings) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fault = Fault(settings)
    folder = Path(settings.folder)
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder / "saved",
            every_n_train_steps=SAVE_EVERY,
            save_top_k=-1,
            save_last=True,
        )
    ]
    if settings.fault == "callback raises":
        callbacks.append(Struck(fault))
    if settings.phase == "write":
        callbacks.append(StrikeWhileWriting(fault))
    seed_everything(5, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=settings.devices,
        strategy=settings.strategy,
        max_epochs=2,
        hang_timeout=settings.hang_timeout,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Net(settings, fault), ckpt_path="last")
    trainer.save_checkpoint(folder / "end.ckpt")


if __name__ == "__main__":
    train(Settings(**json.loads(sys.argv[1])))
