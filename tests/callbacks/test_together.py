"""All callbacks around the loop at once, in two processes, of which one is killed: it ends as an undisturbed one."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GarbageCollection,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    MemorySnapshot,
    ModelCheckpoint,
    ModelPruning,
    Notify,
    OnExceptionCheckpoint,
    PredictionWriter,
    RichModelSummary,
    SavePretrained,
    SpikeDetector,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from loopwright.strategies.launch.launcher import call_in_processes
from tests.callbacks.webhook import Service, serving

SAMPLES, EPOCHS = 48, 4
# By scene, after how many optimizer steps the second process is killed.
KILLS = {"averages": 9, "pruned": 14}


class Pretrained(nn.Linear):
    """Is saved as Hugging Face's models are."""

    def save_pretrained(self, folder: str, state_dict: dict[str, Tensor]) -> None:
        save_file(state_dict, f"{folder}/model.safetensors")


class Net(Module):
    """A backbone with batch norm and dropout, and a head; its rate and batch size may be looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05
        self.batch_size = 2
        self.backbone = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        )
        self.head = Pretrained(6, 1)

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.backbone(batch[0])) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0]))

    def loader(self, shuffle: bool = False) -> DataLoader[Any]:
        x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
        dataset = TensorDataset(x, x.sum(1, keepdim=True))
        return DataLoader(dataset, self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> Any:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader()

    predict_dataloader = val_dataloader

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, self.lr, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Dies(Callback):
    """Ends the second process as ``kill -9`` does, once."""

    def __init__(self, folder: Path, step: int) -> None:
        self.mark = folder / "killed"
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        is_there = trainer.global_rank == 1 and trainer.global_step == self.step
        if is_there and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def averages(folder: Path, url: str) -> list[Callback]:
    return [
        LearningRateFinder(1e-3, 1.0, num_training_steps=16),
        BatchSizeFinder(init_val=2, max_val=4),
        GradientAccumulationScheduler({0: 1, 2: 2}),
        BackboneFinetuning(1),
        EMAWeightAveraging(decay=0.8, update_every="2 steps"),
        StochasticWeightAveraging(0.01, 3, annealing_epochs=1),
        SpikeDetector(every="3 steps"),
        SavePretrained(folder / "pretrained", weight_set="ema"),
        LearningRateMonitor("step"),
        ThroughputMonitor(window_size=2),
        DeviceStatsMonitor(),
        GarbageCollection(every="2 steps"),
        TQDMProgressBar(),
        RichModelSummary(),
        MemorySnapshot(folder / "memory"),
        Timer("1 hour"),
        EarlyStopping("val_loss", patience=9),
        OnExceptionCheckpoint(folder / "exception"),
        Notify(url),
    ]


def pruned(folder: Path, url: str) -> list[Callback]:
    return [
        ModelPruning("random_unstructured", amount=0.2, use_lottery_ticket_hypothesis=True),
        SpikeDetector("skip"),
        PredictionWriter(folder / "predictions"),
    ]  # fmt: skip


SCENES = {"averages": averages, "pruned": pruned}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def run(folder: Path, name: str, url: str, *more: Callback) -> None:
    """Fit, from the last checkpoint if there is one, predict, and keep what this process has then."""
    mine = folder / f"result-{os.environ['RANK']}.pt"
    if mine.exists():
        return
    seed_everything(1, verbose=False)
    module = Net()
    callbacks = SCENES[name](folder, url)
    saves = ModelCheckpoint(
        folder / "ckpt", monitor="val_loss", save_top_k=-1, every_n_train_steps=2
    )
    has_bar = any(isinstance(callback, TQDMProgressBar) for callback in callbacks)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        callbacks=[*callbacks, *more, saves],
        logger=[kind(folder) for kind in (CSVLogger, JSONLinesLogger, TensorBoardLogger)],
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=has_bar,
        enable_model_summary=has_bar,
        profiler="advanced" if has_bar else None,
    )  # fmt: skip
    trainer.fit(module, ckpt_path="last")
    predicted = trainer.predict(module)
    sets = [callback.weight_set for callback in callbacks if callback.weight_set]
    result = {
        "weights": module.state_dict(),
        "sets": {each.name: each.tensors for each in sets},
        "tuned": [module.lr, module.batch_size],
        "optimizer": trainer.optimizers[0].state_dict(),
        "predicted": predicted,
    }
    torch.save(result, mine)


def all_runs(folder: Path, url: str) -> None:
    """Each process; it is started again after each kill."""
    for name in SCENES:
        run(folder / "whole" / name, name, url)
    for name, step in KILLS.items():
        path = folder / "killed" / name
        run(path, name, url, Dies(path, step))


def rows_of(folder: Path) -> list[dict[str, str]]:
    """What the logger has, but for times."""
    (path,) = folder.glob("*/*/metrics.csv")
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if is_exact(name)}
            for row in csv.DictReader(file)
        ]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{n: v for n, v in row.items() if is_exact(n)} for row in rows]


def is_exact(name: str) -> bool:
    return "/" not in name and "Timer" not in name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_with_all_callbacks_ends_as_the_whole_one(
    tmp_path: Path, service: Service
):
    call_in_processes(all_runs, (tmp_path, service.url), 2, max_restarts=2)
    told = [(each["event"], each["global_step"]) for each in service.messages]
    # Whether the main process fails by itself, or is ended first, as rank 1 is killed, is a matter of moments.
    finished = [each for each in told if each[0] != "failed"]
    assert finished == [("finished", 18), ("finished", 18)]
    for name in SCENES:
        whole, killed = (tmp_path / kind / name for kind in ("whole", "killed"))
        assert (killed / "killed").exists()
        for rank in range(2):
            expected, found = (
                torch.load(path / f"result-{rank}.pt") for path in (whole, killed)
            )
            if rank == 1:
                # Of buffers, a process averages its own, and a checkpoint holds those of the first one.
                for result in (expected, found):
                    del result["sets"]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert rows_of(killed) == rows_of(whole), name
        assert lines_of(killed) == lines_of(whole), name
    written = [file.read_bytes() for file in tmp_path.rglob("predictions.jsonl")]
    written += [file.read_bytes() for file in tmp_path.rglob("pretrained/*")]
    assert len(written) == 4
    assert len({*written}) == 2
