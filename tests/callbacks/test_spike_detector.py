"""A run that meets a poisoned batch goes back and past it, or skips the step, as if the batch had not been there."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from loopwright.callbacks import Callback, ModelCheckpoint, SpikeDetector
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.loggers import CSVLogger
from tests.strategies.distributed import in_processes

BATCH = 4
SAMPLES = 48


class Samples(Dataset):
    """Each sample is augmented at random; those that are poisoned are multiplied by ``factor``."""

    def __init__(self, *poisoned: int, factor: float = math.nan) -> None:
        self.poisoned = poisoned
        self.factor = factor

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = torch.randn(4, generator=torch.Generator().manual_seed(index))
        x = clean + 0.1 * torch.randn(4)
        return (x * self.factor if index in self.poisoned else x), clean.sum()


class Stream(IterableDataset):
    def __init__(self, *poisoned: int) -> None:
        self.samples = Samples(*poisoned)

    def __iter__(self) -> Iterator[Any]:
        yield from (self.samples[index] for index in range(SAMPLES))


class Net(Module):
    """Dropout, batch norm, a scheduler of steps, logged values."""

    def __init__(self, normalizes: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8) if normalizes else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(4, 8), norm, nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x)[:, 0] - y).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Dies(Callback):
    """Saves and raises after a batch, once it has come there so often."""

    def __init__(self, path: Path, batch_idx: int, times: int) -> None:
        self.path = path
        self.batch_idx = batch_idx
        self.times = times

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times -= batch_idx == self.batch_idx
        if not self.times:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


def made(folder: Any, *callbacks: Callback, every: int = 2, **options: Any) -> Trainer:
    saves = ModelCheckpoint(
        Path(folder) / "ckpt", every_n_train_steps=every, save_top_k=-1
    )
    options = {"max_epochs": 1, "precision": "32-true", **options}
    return Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, saves],
        logger=CSVLogger(folder, version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fitted(
    folder: Any,
    loader: Any,
    *callbacks: Callback,
    module: Callable[[], Module] = Net,
    ckpt_path: Any = None,
    **options: Any,
) -> list[Tensor]:
    """The weights and buffers that a fit ends with."""
    seed_everything(1, verbose=False)
    net = module()
    made(folder, *callbacks, **options).fit(net, loader, ckpt_path=ckpt_path)
    return [value.clone() for value in net.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows(folder: Any) -> str:
    return (Path(folder) / "loopwright_logs/version_0/metrics.csv").read_text()


def without(batches: list[int]) -> DataLoader[Any]:
    """The loader of a dataset that never had these batches."""
    left = [index for index in range(SAMPLES) if index // BATCH not in batches]
    return DataLoader(Subset(Samples(), left), BATCH)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_goes_back_and_ends_as_if_the_batch_had_not_been_there(
    tmp_path: Path, accumulate: int, caplog: pytest.LogCaptureFixture
):
    detector = SpikeDetector(every_n_steps=3)
    options = {"accumulate_grad_batches": accumulate}
    found = fitted(tmp_path / "a", DataLoader(Samples(29), BATCH), detector, **options)
    (incident,) = detector.incidents
    window = [7] if accumulate == 1 else [6, 7]
    assert incident["batches"] == window
    assert 29 in incident["samples"]
    assert len(incident["samples"]) == BATCH * accumulate
    assert "samples 2" in caplog.text
    assert same(found, fitted(tmp_path / "b", without(window), **options))
    # Rows after the checkpoint are rewound, and its steps are those of the run without the batch.
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def in_order(trainer: Trainer, epoch: int) -> list[list[int]]:
    return [trainer.samples_of(i, epoch) or [] for i in range(SAMPLES // BATCH)]


def test_the_samples_of_a_shuffled_loader_are_named(tmp_path: Path):
    detector = SpikeDetector()
    nets: list[Net] = []

    def module() -> Net:
        nets.append(Net())
        return nets[0]

    loader = DataLoader(Samples(29), BATCH, shuffle=True)
    found = fitted(tmp_path / "a", loader, detector, module=module, max_epochs=2)
    assert [incident["epoch"] for incident in detector.incidents] == [0, 1]
    order = [in_order(nets[0].trainer, epoch) for epoch in (0, 1)]
    for incident in detector.incidents:
        batch = order[incident["epoch"]][incident["batches"][0]]
        assert incident["samples"] == batch
        assert 29 in batch
    left = [batch for epoch in order for batch in epoch if 29 not in batch]
    reference = DataLoader(Samples(), batch_sampler=left)  # type: ignore[arg-type]
    # Batch norm, dropout and augmentation draw as they would without these batches.
    assert same(found, fitted(tmp_path / "b", reference))


def test_a_run_that_is_killed_after_it_leaves_the_batch_out_too(tmp_path: Path):
    killed_after_it_went_back(tmp_path)


def killed_after_it_went_back(folder: Path) -> None:
    """Every rank checks for itself; where there are two, a step has a batch of each."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    path = folder / "own.ckpt"
    # It goes back to a checkpoint, has not come to the batch again, and is killed.
    at = 7 if ranks == 1 else 4
    # That of the last rank.
    first = (at * ranks + ranks - 1) * BATCH
    loader = DataLoader(Samples(first + 1), BATCH)
    options = {"every": 3, "strategy": "ddp" if ranks > 1 else "auto", "devices": ranks}
    dies = Dies(path, at - 1, times=2)
    with pytest.raises(RuntimeError, match="killed"):
        fitted(folder / "a", loader, SpikeDetector(), dies, **options)
    again = SpikeDetector()
    found = fitted(folder / "a", loader, again, ckpt_path=path, **options)
    assert again.rollbacks == 1
    (incident,) = again.incidents
    assert incident["batches"] == [at]
    assert incident["samples"] == list(range(first, first + BATCH))
    left_out = range(at * ranks, (at + 1) * ranks)
    assert same(found, fitted(folder / "b", without([*left_out]), **options))


def test_streams_are_named_by_position(tmp_path: Path, caplog: Any):
    detector = SpikeDetector()
    loader = DataLoader(Stream(29), BATCH)
    fitted(tmp_path, loader, detector)
    assert detector.incidents[0]["batches"] == [7]
    assert detector.incidents[0]["samples"] is None
    assert "batch 7" in caplog.text


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path):
    in_processes(2, killed_after_it_went_back, tmp_path)
