"""Whether a training whose ranks are killed and stopped again and again ends as an undisturbed one.

`python -m benchmarks restarts --kills 8` trains 300 steps in two processes with `max_restarts=20`. About every 5 s of
training, a random rank gets SIGKILL or SIGSTOP. Nothing but the restarts of the job brings it to its end. Then its
weights must be those of an undisturbed training to the last bit, and each step must be in each of its curves once.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Trainer, seed_everything
from loopwright.strategies import DDPStrategy

from .kills import Net, Noisy
from .report import Table

STEPS, STEPS_BETWEEN_SAVES = 300, 5
SECONDS_OF_STEP = 0.1
# A signal comes so many seconds, at least and at most, after both ranks have trained.
PAUSE = (3.0, 7.0)
# After which a training that should be running is taken for one that hangs.
LIMIT = 120.0
# The file that is there when there is nothing left to train. Who is stopped after that is not watched.
TRAINED = "trained"


class Tells(Callback):
    """Writes down, in each rank, that an attempt has trained."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.told = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(SECONDS_OF_STEP)
        if not self.told:
            self.told = True
            row = (time.time(), trainer.global_rank, os.getpid(), trainer.global_step)
            with self.file.open("a") as file:
                file.write(f"{json.dumps(row)}\n")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.file.with_name(TRAINED).touch()


def train(folder: Path, steps: int, loggers: Sequence[str]) -> None:
    """What the processes of a training run."""
    seed_everything(3, verbose=False)
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(max_restarts=20),
        hang_timeout={"train": 10},
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        logger=[*loggers],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(every_n_train_steps=STEPS_BETWEEN_SAVES),
            Tells(folder / "attempts.txt"),
        ],
    )
    trainer.fit(Net(), DataLoader(Noisy(8 * 2 * 24), 8, shuffle=True))
    trainer.save_checkpoint(folder / "end.ckpt")


def attempts(folder: Path) -> list[list[Any]]:
    """What the ranks of all attempts have told: when, which rank, which process, which step."""
    file = folder / "attempts.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def run(
    folder: Path,
    steps: int,
    loggers: Sequence[str],
    kills: Sequence[int] = (),
    pause: tuple[float, float] = PAUSE,
    seed: int = 0,
) -> list[float]:
    """Run a training to its end, and send these signals to its ranks meanwhile.

    Returns:
        How many seconds after each signal it trained again.

    Raises:
        RuntimeError: if it hangs, or fails.
    """
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    output = folder / "output.txt"
    command = [sys.executable, "-m", "benchmarks.restarts", str(folder), str(steps)]
    again: list[float] = []
    killed_at = 0.0
    left = list(kills)
    with output.open("w") as file:
        # There is no service.
        environment = {**os.environ, "WANDB_MODE": "offline"}
        program = subprocess.Popen(
            [*command, *loggers],
            stdout=file,
            stderr=file,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        known = 0
        while program.poll() is None:
            told = attempts(folder)
            began = time.monotonic()
            while len(told) < known + 2 and program.poll() is None:
                time.sleep(0.05)
                told = attempts(folder)
                if time.monotonic() > began + LIMIT:
                    program.kill()
                    raise RuntimeError(f"it does not train again\n{output.read_text()}")
            if program.poll() is not None:
                break
            known = len(told)
            if killed_at:
                again.append(max(row[0] for row in told[-2:]) - killed_at)
                killed_at = 0.0
            if not left:
                program.wait(LIMIT + steps)
                break
            time.sleep(draw.uniform(*pause))
            if (folder / TRAINED).exists():
                break
            _, _, process, _ = draw.choice(told[-2:])
            try:
                os.kill(process, left.pop())
            except ProcessLookupError:
                break
            killed_at = time.time()
        program.wait(LIMIT)
    if program.returncode:
        raise RuntimeError(f"it failed ({program.returncode})\n{output.read_text()}")
    return again


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses by step in all that was logged, by kind of log."""
    found = {}
    for path in folder.rglob("metrics.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found["csv"] = [
            (int(r["step"]), float(r["loss_step"])) for r in rows if r["loss_step"]
        ]
    for name in ("metrics.jsonl", "rows.jsonl"):
        for path in folder.rglob(name):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            values = [(row.get("values", row), row["step"]) for row in rows]
            # The run's record has a file of the same name as a logger's.
            kind = "record" if path.parent.name == "record" else name
            found[kind] = [(s, v["loss_step"]) for v, s in values if "loss_step" in v]
    for path in {path.parent for path in folder.rglob("events.out.tfevents*")}:
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        scalars = events.Scalars("loss_step")
        found["tensorboard"] = [(event.step, event.value) for event in scalars]
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "end.ckpt" / "model" / "model.safetensors")


def compare_ends(folder: Path, whole: Path, steps: int) -> None:
    """Compare what a disturbed and an undisturbed training have left.

    Raises:
        RuntimeError: if it is not the same, or a step is not in a curve once.
    """
    ours, theirs = weights(folder), weights(whole)
    if any(not tensor.equal(theirs[name]) for name, tensor in ours.items()):
        raise RuntimeError(f"{folder}: the weights are not those of {whole}")
    expected = curves(whole)
    if "record" not in expected:
        raise RuntimeError(f"{whole}: there is no record of the run")
    for kind, curve in curves(folder).items():
        if [step for step, _ in curve] != list(range(1, steps + 1)):
            raise RuntimeError(f"{folder}: {kind} has steps {curve}")
        if curve != expected[kind]:
            raise RuntimeError(f"{folder}: {kind} differs from that of {whole}")


def compare(
    kills: int,
    folder: Path,
    steps: int = STEPS,
    loggers: Sequence[str] = ("csv", "tensorboard", "jsonl", "wandb"),
    pause: tuple[float, float] = PAUSE,
    seed: int = 0,
) -> Table:
    """Train with and without disturbance."""
    draw = random.Random(seed)
    kinds = [signal.SIGKILL, signal.SIGSTOP]
    signals = [draw.choice(kinds) for _ in range(kills)]
    run(folder / "whole", steps, loggers)
    again = run(folder / "killed", steps, loggers, signals, pause, seed)
    compare_ends(folder / "killed", folder / "whole", steps)
    trained = attempts(folder / "killed")
    row = [
        str(steps),
        str(len(again)),
        f"{median(again or [0.0]):.1f}",
        f"{max(again or [0.0]):.1f}",
    ]
    return Table(
        "Ranks killed and stopped under `max_restarts=20`",
        ("steps", "kills and stops", "trains again after, s (median)", "at most"),
        [row],
        {"again": again, "attempts": trained},
        [
            "The weights are those of an undisturbed training, bit for bit, and each step is in each curve once: "
            + ", ".join(loggers)
        ],
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
