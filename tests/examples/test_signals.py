"""Signals that ask a training to end, sent to real programs: the window is finished, a checkpoint saved, and the exit
code tells; the run that goes on from there ends as if nothing had happened."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import run_program

# Arguments: how many processes; who gets the signals ("self", "agent" or "rank 1"), when, and which.
PROGRAM = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from loopwright.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.loggers import CSVLogger

devices, target, moment, *signals = sys.argv[1:]
torch.set_num_threads(1)


class Net(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.mean = MeanMetric()

    def send(self, now):
        if now != moment:
            return
        receives = {"self": True, "agent": self.trainer.is_global_zero, "rank 1": self.trainer.global_rank == 1}
        for name in signals if receives[target] else ():
            os.kill(os.getppid() if target == "agent" else os.getpid(), getattr(signal, name))
            while len(signals) > 1 and not self.trainer.consensus.signal_requested:
                pass  # two that come at once are one
        while len(signals) > 1:
            signal.pause()  # for ever, if nothing ends it

    def training_step(self, batch, batch_idx):
        self.send(f"{self.current_epoch}.{batch_idx}")
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.send(f"validation {self.current_epoch}.{batch_idx}")
            print(f"validated {self.current_epoch}.{batch_idx} on rank {self.trainer.global_rank}")
        self.mean.update(self.net(batch).mean())
        self.log("val_mean", self.mean)
        self.log("val_loss", self.net(batch).square().mean() + 0.0 * torch.rand(1).item())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7), "interval": "step"}]


seed_everything(3)
data = torch.randn(39, 4, generator=torch.Generator().manual_seed(1))
trainer = Trainer(
    accelerator="cpu", devices=int(devices), max_epochs=3, accumulate_grad_batches=2, log_every_n_steps=1,
    logger=CSVLogger("logs"), default_root_dir=".", enable_progress_bar=False, enable_model_summary=False,
    callbacks=[ModelCheckpoint("ckpt", monitor="val_loss", save_top_k=2), EarlyStopping("val_loss", patience=9),
               OnExceptionCheckpoint("ckpt")],
)
trainer.fit(
    Net(), DataLoader(data, 2, shuffle=True, num_workers=1), DataLoader(data[:8], 2), ckpt_path="last",
)
trainer.save_checkpoint("end.ckpt")
"""


def run(
    folder: Path,
    devices: int = 1,
    target: str = "self",
    moment: str = "never",
    *signals: str,
) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    return run_program("program.py", devices, target, moment, *signals, cwd=folder)


def rows(folder: Path) -> list[str]:
    (file,) = (folder / "logs").rglob("metrics.csv")
    return file.read_text().splitlines()


# One after the other: who gets which signal, and when.
CHAINS = {
    1: [
        ("self", "0.4", "SIGTERM"),  # in the first batch of a window
        ("self", "0.19", "SIGUSR1"),  # in the last batch of an epoch
        ("self", "validation 1.1", "SIGTERM"),
        ("self", "2.5", "SIGINT"),
    ],
    2: [
        ("agent", "0.4", "SIGTERM"),
        ("rank 1", "1.3", "SIGUSR1"),
        ("rank 1", "validation 1.0", "SIGTERM"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("devices", CHAINS)
def test_the_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, devices: int):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended = run(whole, devices)
    assert ended.returncode == 0, ended.stderr
    for target, moment, name in CHAINS[devices]:
        ended = run(cut, devices, target, moment, name)
        number = getattr(signal, name)
        # Python ends by the signal itself where KeyboardInterrupt is not caught; a shell shows 130 for both.
        codes = (-number, 128 + number) if number == signal.SIGINT else (128 + number,)
        assert ended.returncode in codes, ended.stderr
        step, path = re.findall(
            rf"{name} at step (\d+): saved (.*); ending", ended.stderr
        )[0]
        assert path.endswith(f"-step={step}.ckpt")
        saved = {path.name for path in (cut / "ckpt").iterdir()}
        assert Path(path).name in saved
        assert "on_exception.ckpt" not in saved, "one is enough"
        assert not [name for name in saved if name.startswith(".")]

    ended = run(cut, devices)
    assert ended.returncode == 0, ended.stderr
    if devices == 2:
        # All processes had left the validation together, those too that got no signal, to run it again now.
        assert "validated 1.0 on rank 0" in ended.stdout
    for file in ("model/model.safetensors", "optimizer/optimizer.safetensors"):
        expected, got = (
            load_file(folder / "end.ckpt" / file) for folder in (whole, cut)
        )
        assert all(torch.equal(expected[name], got[name]) for name in expected), file
    assert rows(whole) == rows(cut)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "target"), [(1, "self"), (2, "agent")])
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, devices: int, target: str):
    """In the middle of a step, without a checkpoint."""
    ended = run(tmp_path, devices, target, "0.4", "SIGINT", "SIGINT")
    assert ended.returncode in (-signal.SIGINT, 128 + signal.SIGINT), ended.stderr
    assert "Once more ends at once" in ended.stderr
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


@pytest.mark.slow
def test_a_programs_own_handler_is_left_alone(tmp_path: Path):
    program = PROGRAM.replace(
        "seed_everything(3)", 'signal.signal(signal.SIGTERM, lambda *_: print("mine"))'
    )
    (tmp_path / "own.py").write_text(program)
    ended = run_program("own.py", 1, "self", "0.4", "SIGTERM", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "mine" in ended.stdout
