"""Whether steps of a training can be gone back to, and whether its ranks are rightly believed to agree.

`python -m benchmarks replays` trains two processes with dropout, augmentation in workers and accumulated gradients, and
then goes back to random steps of random ranks by `loopwright replay`. Each must have the fingerprint that was recorded,
to the last bit. The same training with a sample that raises in step 137 must be taken back to that error by the command
that it prints. And a long training whose ranks compare their parameters every 100 steps must not be stopped.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import Module, Trainer, seed_everything

from .kills import Noisy
from .report import Table

STEPS, POISONED = 160, 137
BATCH, WINDOW, PROCESSES = 4, 2, 2
STEPS_OF_EPOCH, STEPS_BETWEEN_SAVES = 40, 25
EQUAL = "equals what was recorded, bit for bit"


class Net(Module):
    """Raises in one rank, at the step that it is given."""

    def __init__(self, raises_at: int = -1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 32)
        )
        self.raises_at = raises_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step + 1 == self.raises_at and self.global_rank == 1:
            raise ValueError("a poisoned sample")
        loss = (self.net(batch) - batch.flip(1)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer_of(folder: Path, steps: int, **arguments: Any) -> Trainer:
    """Return what both trainings have in common, with their own arguments."""
    seed_everything(3, verbose=False)
    return Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp",
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def train(folder: Path, raises_at: int) -> None:
    """The training to go back into."""
    samples = STEPS_OF_EPOCH * BATCH * WINDOW * PROCESSES
    saves = ModelCheckpoint(every_n_train_steps=STEPS_BETWEEN_SAVES, save_top_k=-1)
    trainer = trainer_of(
        folder,
        STEPS,
        accumulate_grad_batches=WINDOW,
        fingerprint=1,
        logger="csv",
        callbacks=[saves],
    )
    loader = DataLoader(
        Noisy(samples), BATCH, shuffle=True, num_workers=1, persistent_workers=True
    )
    trainer.fit(Net(raises_at), loader)


def train_long(folder: Path, steps: int) -> None:
    """A training that nothing disturbs, whose ranks compare their parameters."""
    trainer = trainer_of(
        folder, steps, fingerprint=100, logger=False, enable_checkpointing=False
    )
    batches: Any = torch.randn(1000, PROCESSES * BATCH, 32)
    trainer.fit(Net(), DataLoader(batches.flatten(0, 1), BATCH, shuffle=True))
    if trainer.global_step != steps:
        raise RuntimeError(f"it ended at step {trainer.global_step} of {steps}")


def program(*arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python's to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | variables,
        cwd=Path(__file__).parents[1],
        text=True,
        capture_output=True,
        check=False,
    )


def loopwright(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return program("-m", "loopwright", *arguments)


def compare(replays: int, steps: int, folder: Path, seed: int = 0) -> Table:
    """Go back to as many steps, and train undisturbed for as many.

    Raises:
        RuntimeError: if a training does not end as it should.
    """
    draw = random.Random(seed)
    whole = folder / "whole"
    ended = program("-m", "benchmarks.replays", whole, 0)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    asked = [
        (draw.randint(1, STEPS), draw.randrange(PROCESSES)) for _ in range(replays)
    ]
    other = []
    seconds = []
    for step, rank in asked:
        began = time.monotonic()
        told = loopwright("replay", whole, "--step", step, "--rank", rank)
        seconds.append(time.monotonic() - began)
        if told.returncode or EQUAL not in told.stdout:
            other.append(f"step {step}, rank {rank}: {told.stdout}{told.stderr}")
            print(other[-1], flush=True)
    rows: list[Sequence[str]] = [
        [
            f"random steps of {STEPS}, replayed",
            str(replays),
            f"{replays - len(other)} bit-equal",
        ],
        [f"a sample that raises in step {POISONED}", "1", replay_poisoned(folder)],
    ]
    began = time.monotonic()
    ended = program("-m", "benchmarks.replays", folder / "long", -steps)
    outcome = "FALSE ALARM" if ended.returncode else "no alarm"
    rows.append(["undisturbed steps, ranks compared every 100", str(steps), outcome])
    if ended.returncode:
        print(ended.stderr)
    figures = {
        "asked": asked,
        "other": other,
        "seconds": seconds,
        "long": time.monotonic() - began,
    }
    note = (
        f"Two processes, dropout, augmentation in a worker, windows of {WINDOW} batches, a checkpoint every "
        f"{STEPS_BETWEEN_SAVES} steps. A replay takes {sum(seconds) / max(1, len(seconds)):.0f} s."
    )
    return Table(
        "Going back to steps", ("", "how many", "outcome"), rows, figures, [note]
    )


def replay_poisoned(folder: Path) -> str:
    """Train until a sample raises, and run the command that is printed then."""
    failed = program("-m", "benchmarks.replays", folder / "poisoned", POISONED)
    printed = re.search(r"^loopwright (replay .*)$", failed.stderr, re.MULTILINE)
    if printed is None:
        return "FAILS: no command was printed"
    again = loopwright(*shlex.split(printed[1]))
    same = "ValueError: a poisoned sample" in again.stderr
    named = f"step {POISONED}, rank 1 of {PROCESSES}" in again.stdout
    return "the same error" if same and named else "FAILS: another error"


if __name__ == "__main__":
    number = int(sys.argv[2])
    if number < 0:
        train_long(Path(sys.argv[1]), -number)
    else:
        train(Path(sys.argv[1]), number or -1)
