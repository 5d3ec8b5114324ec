"""How long it takes from the start of a program to the first training step of two processes.

`python train.py` starts them itself, by running the script again in each, which is compared with torchrun on the same
script. The script does nothing that takes time before it trains; one that does, does it once more in the process that
starts the others.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .report import Table, verdict

TARGET = 1.0  # seconds over torchrun's
COMMANDS = {
    "torchrun": (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
    ),
    "python": ("train.py",),
}
TITLES = {
    "torchrun": "`torchrun --standalone --nproc-per-node=2 train.py`",
    "python": "`python train.py`",
}

SCRIPT = """
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from loopwright.framework import Module, Trainer


class Linear(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        if self.trainer.is_global_zero:
            Path("first_step").write_text(str(time.time()))
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, barebones=True)
trainer.fit(Linear(), DataLoader(torch.ones(8, 32), batch_size=4))
"""


def seconds(name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(SCRIPT)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        start = time.time()  # the only clock that processes have in common
        process = subprocess.Popen(
            (sys.executable, *COMMANDS[name]), cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        shown, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{TITLES[name]} failed:\n{shown[-4000:]}")
        return float(Path(folder, "first_step").read_text()) - start


def compare(rounds: int) -> Table:
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name in COMMANDS if turn % 2 == 0 else reversed(COMMANDS):
            found[name].append(seconds(name))
    for times in found.values():
        del times[0]  # this one has filled the disk's cache
    added = [
        own - theirs
        for own, theirs in zip(found["python"], found["torchrun"], strict=True)
    ]
    rows, figures = [], {}
    for name, times in found.items():
        over, target = (
            (statistics.median(added), TARGET) if name == "python" else (0.0, None)
        )
        rows.append([
            TITLES[name], f"{statistics.median(times):.2f}", f"{over:.2f}" if target else "",
            *verdict(over, target, " s"),
        ])  # fmt: skip
        figures[name] = {"seconds": times, "over_torchrun_s": over, "target_s": target}
    return Table(
        "From the start of a program to the first step of two processes (DDP)",
        ("", "s", "over torchrun's, s", "target", ""),
        rows,
        figures,
        [f"Medians of {rounds}."],
    )
