"""How long a whole program takes: imports, the start of two processes, training, validation, test, and its end.

The same small model and data for all, with TensorBoard, a progress bar, and a checkpoint for each epoch. They run in
turns. Loopwright and Lightning start their processes themselves; the program by hand and Accelerate's are started by
torchrun. The time on the CPU is that of all processes of a program.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from .report import Table, verdict

TARGET = 0.3  # seconds over the program by hand
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

DATA = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def data(size):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(size, 32), torch.randn(size, 2))

def layers():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
"""

TRAINER = """
class Model(Module):
    def __init__(self):
        super().__init__()
        self.layers = layers()
    def loss(self, batch):
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=TensorBoardLogger("logs"))
model = Model()
trainer.fit(model, DataLoader(data(1600), 8, shuffle=True), DataLoader(data(160), 8))
trainer.test(model, DataLoader(data(160), 8))
"""

LOOP = """
writer = SummaryWriter("logs") if rank == 0 else None
step = 0
for epoch in range(2):
    if sampler is not None:
        sampler.set_epoch(epoch)
    bar = tqdm(train, disable=rank != 0)
    for x, y in bar:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        step += 1
        if step % 50 == 0 and rank == 0:
            writer.add_scalar("loss", loss.item(), step)
            bar.set_postfix(loss=loss.item())
    found = evaluate(val)
    if rank == 0:
        writer.add_scalar("val_loss", found, step)
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(states, f"epoch-{epoch}.pt")
found = evaluate(test)
if rank == 0:
    writer.add_scalar("test_loss", found, step)
    writer.close()
    print("test_loss", found)
"""

BY_HAND = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

dist.init_process_group("gloo")
rank = dist.get_rank()
sampler = DistributedSampler(data(1600))
train = DataLoader(data(1600), 8, sampler=sampler)
val, test = (DataLoader(data(160), 8, sampler=DistributedSampler(data(160), shuffle=False)) for _ in range(2))
model = DistributedDataParallel(layers())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
backward = torch.Tensor.backward

def evaluate(loader):
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y) for x, y in loader]
    model.train()
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()
"""

ACCELERATE = """
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
sampler = None
model = layers()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, train, val, test = accelerator.prepare(
    model, optimizer, DataLoader(data(1600), 8, shuffle=True), DataLoader(data(160), 8), DataLoader(data(160), 8)
)
backward = accelerator.backward

def evaluate(loader):
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y) for x, y in loader]
    model.train()
    return accelerator.gather(torch.stack(losses).mean()).mean().item()
"""

OURS = """
from loopwright.framework import Module, Trainer
from loopwright.loggers import TensorBoardLogger
"""

LIGHTNING = """
from lightning.pytorch import LightningModule as Module, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
"""

# By name: what is installed for it, how it is started, and the program.
PROGRAMS = {
    "by hand": ("torch", TORCHRUN, DATA + BY_HAND + LOOP + "dist.destroy_process_group()\n"),
    "Loopwright": ("loopwright", (), DATA + OURS + TRAINER),
    "Loopwright, torchrun": ("loopwright", TORCHRUN, DATA + OURS + TRAINER),
    "Lightning": ("lightning", (), DATA + LIGHTNING + TRAINER),
    "Accelerate, torchrun": ("accelerate", TORCHRUN, DATA + ACCELERATE + LOOP + "accelerator.end_training()\n"),
}  # fmt: skip


def run(name: str) -> dict[str, float]:
    """Run a program to its end; returns seconds, and those on the CPU."""
    _, launcher, program = PROGRAMS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(program)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        ended = subprocess.run(
            (sys.executable, *launcher, "train.py"), cwd=folder, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    if ended.returncode != 0 or "test_loss" not in ended.stdout:
        raise RuntimeError(f"{name} failed:\n{ended.stdout[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = [each.ru_utime + each.ru_stime for each in (before, after)]
    return {
        "seconds": seconds,
        "cpu_s": used[1] - used[0],
        "faults": after.ru_minflt - before.ru_minflt,
    }


def compare(rounds: int) -> Table:
    names = [name for name, (needs, *_) in PROGRAMS.items() if find_spec(needs)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(run(name))

    def median(name: str, kind: str) -> float:
        return statistics.median(each[kind] for each in found[name])

    rows: list[list[str]] = []
    for name in names:
        over = [
            own["seconds"] - theirs["seconds"]
            for own, theirs in zip(found[name], found["by hand"], strict=True)
        ]
        target = TARGET if name == "Loopwright" else None
        rows.append([
            name, f"{median(name, 'seconds'):.2f}", f"{statistics.median(over):+.2f}",
            *verdict(statistics.median(over), target, " s"), f"{median(name, 'cpu_s'):.2f}",
            f"{median(name, 'faults') / 1000:.0f}",
        ])  # fmt: skip
    return Table(
        "A whole program of two processes: imports, start, training, validation, test, end",
        ("", "s", "over that by hand, s", "target", "", "CPU s", "page faults, thousands"),
        [*rows],
        {"programs": found},
        [f"Medians of {rounds}."],
    )  # fmt: skip
