"""Checkpoints, resuming, loggers, folders and printing with several processes."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, SumMetric

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import CheckpointError, DataModule, Engine, Module, Trainer
from loopwright.loggers import CSVLogger, TensorBoardLogger
from loopwright.strategies import DDPStrategy
from tests.samples import as_dataset
from tests.strategies.distributed import all_in_processes, in_processes, quiet


def best_path(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    assert callback is not None
    return callback.best_model_path


class Noisy(Dataset):
    """With random augmentation."""

    def __init__(self, samples: int = 56) -> None:
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] + 0.1 * torch.randn(4)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.mean = MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.mean.update(loss.detach(), len(batch))
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7),
                "interval": "step",
            }
        ]


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def run(folder: Path, workers: int, stop: int = 0, ckpt_path: str | None = None) -> Any:
    torch.manual_seed(4)
    module = Net()
    callbacks: list[Callback] = [
        ModelCheckpoint(dirpath=folder / "ckpt", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(dirpath=folder / "best", monitor="val_loss", save_last=True),
        EarlyStopping("val_loss", patience=50),
        *([Stop(stop)] if stop else []),
    ]
    trainer = quiet(
        callbacks=callbacks,
        enable_checkpointing=True,
        max_epochs=3,
        accumulate_grad_batches=2,
    )
    # Each process has random numbers of its own, as when nothing was seeded.
    torch.manual_seed(trainer.global_rank)
    trainer.state.seed = 11
    loader = DataLoader(Noisy(), 3, shuffle=True, num_workers=workers)
    try:
        trainer.fit(module, loader, DataLoader(Noisy(10), 3), ckpt_path=ckpt_path)
    except InterruptedError:
        assert trainer.global_step == stop
        trainer.strategy.barrier()
        return None
    return trainer.strategy.gather_objects(
        (
            {name: tensor.clone() for name, tensor in module.state_dict().items()},
            {name: float(value) for name, value in trainer.callback_metrics.items()},
            best_path(trainer),
            torch.rand(1).item(),
        )
    )


def cut_and_resumed(folder: Path, workers: int) -> list[Any]:
    runs = [run(folder / "whole", workers)]
    # In the second and in the third epoch of 4 windows, the last of which is short; with workers in one of them.
    for stop in (5, 9)[workers:]:
        run(folder / f"cut{stop}", workers, stop)
        runs.append(run(folder / f"cut{stop}", workers, ckpt_path="last"))
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tb" / "loopwright_logs" / "version_4").mkdir(parents=True)
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture(scope="module")
def three(folder: Path) -> dict[str, Any]:
    """What three processes come to, which are started once for all tests: a sum of two has one order only."""
    return all_in_processes(
        3,
        {
            **{
                f"{workers} workers": (cut_and_resumed, folder / f"{workers}", workers)
                for workers in (0, 1)
            },
            "log": (log, folder),
            "alone": (alone,),
            "fail to save": (fail_to_save, folder / "file" / "x.ckpt"),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_ends_as_if_it_had_not_been_cut(
    three: dict[str, Any], workers: int
):
    whole, *resumed = three[f"{workers} workers"]
    for again in resumed:
        for (weights, metrics, _, rng), (weights_2, metrics_2, _, rng_2) in zip(
            whole, again, strict=True
        ):
            assert all(weights[name].equal(weights_2[name]) for name in weights)
            assert metrics == metrics_2
            assert rng == rng_2
    assert len({rng for *_, rng in whole}) == 3, (
        "each process has random numbers of its own"
    )
    # One process wrote, and all know where.
    assert len({path for *_, path, _ in whole}) == 1
    newest = Path(whole[0][2])
    assert (newest / "rng" / "rank-2.json").exists()
    saved = load_file(newest / "model" / "model.safetensors")
    assert all(tensor.equal(whole[0][0][name]) for name, tensor in saved.items())


def resume_elsewhere(path: str) -> Any:
    module = Net()
    trainer = quiet(max_epochs=4)
    trainer.fit(module, DataLoader(Noisy(), 3, shuffle=True), ckpt_path=path)
    return trainer.global_step, trainer.current_epoch


def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    three: dict[str, Any], folder: Path
):
    at_an_epochs_end = str(folder / "0" / "whole" / "best" / "last.ckpt")
    assert resume_elsewhere(at_an_epochs_end)[1] == 4
    assert in_processes(2, resume_elsewhere, at_an_epochs_end)[1] == 4


# -- one process of several -------------------------------------------------------------------------------------------


class Counts(Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = SumMetric()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.update(len(batch))
        self.log("seen", self.seen)
        self.log("mean", batch.mean())


def alone() -> Any:
    """A test with one device after the runs of all processes, and an engine: by rank, and with one of them waiting."""
    rank, found = dist.get_rank(), []
    module, loader = Counts(), DataLoader(as_dataset(torch.arange(11.0)[:, None]), 2)
    for arguments in (
        {"devices": 1},
        {"strategy": "single"},
        {"devices": 1, "strategy": "ddp"},
    ):
        trainer = quiet(**arguments)
        if rank != 1:
            found += trainer.test(module, loader, verbose=False)
            assert (trainer.world_size, trainer.engine.is_copy) == (1, rank > 0)
    engine = Engine(accelerator="cpu", devices=1)
    assert len(list(engine.prepare(loader))) == 6
    assert module.seen.distributed_available_fn(), "as before"
    own: list[Any] = [None] * 3
    dist.all_gather_object(own, found)
    return own


def test_a_trainer_for_one_device_runs_by_itself_in_each_process(three: dict[str, Any]):
    assert three["alone"] == [
        [{"seen": 11.0, "mean": 5.0}] * 3,
        [],
        [{"seen": 11.0, "mean": 5.0}] * 3,
    ]


# -- loggers, folders, printing ---------------------------------------------------------------------------------------


class Data(DataModule):
    def prepare_data(self) -> None:
        with open("prepared", "a") as file:
            file.write("x")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(), 3)


class Logs(Net):
    def on_train_start(self) -> None:
        assert Path("prepared").exists(), "before the others went on"
        for logger in self.loggers:  # as user code does in all processes
            logger.experiment.add_text("note", "text") if isinstance(
                logger, TensorBoardLogger
            ) else None
            logger.log_hyperparams({"a": 1})
        first: Any = self.logger
        first.experiment.add_scalar("own", 1.0, 0)
        self.print("printed once")


def log(folder: Path) -> Any:
    os.chdir(folder)
    trainer = quiet(
        logger=[TensorBoardLogger("tb"), CSVLogger("csv")],
        log_every_n_steps=1,
        callbacks=[
            ModelCheckpoint(),
            ModelCheckpoint("timed", train_time_interval=timedelta(0), save_top_k=-1),
        ],
        enable_checkpointing=True,
    )
    trainer.fit(Logs(), datamodule=Data())
    return trainer.strategy.gather_objects(
        (
            trainer.log_dir,
            best_path(trainer),
            [str(logger.version) for logger in trainer.loggers],
        )
    )


def test_files_are_written_once_and_all_know_where(three: dict[str, Any], folder: Path):
    first, *others = three["log"]
    assert others == [first, first]
    assert first[0].endswith("tb/loopwright_logs/version_5")
    assert first[2] == ["5", "0"]
    assert Path(first[1]).is_dir()
    assert len(list((folder / "tb").rglob("events*"))) == 1
    assert len(list((folder / "csv").rglob("metrics.csv"))) == 1
    assert (folder / "prepared").read_text() == "x"
    assert len(list((folder / "timed").glob("*.ckpt"))) == 7, (
        "all processes see the interval's end at the same steps"
    )


def test_what_ddp_cannot_do_is_refused():
    with pytest.raises(ValueError, match="sync_batchnorm"):
        quiet(devices=2, sync_batchnorm=True)
    with pytest.raises(ValueError, match=r"timeout must be a datetime.timedelta"):
        DDPStrategy(timeout=30)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_restarts must be an integer from 0"):
        DDPStrategy(max_restarts=-1)
    with pytest.raises(
        ValueError, match='"ddp", which works in scripts and in notebooks'
    ):
        quiet(devices=2, strategy="ddp_spawn")


def fail_to_save(path: Path) -> Any:
    trainer = quiet()
    trainer.fit(Net(), DataLoader(Noisy(), 3))
    with pytest.raises(
        OSError, match=r"file/x\.ckpt' could not be written: File exists"
    ):  # on both ranks
        trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        trainer.fit(Net(), DataLoader(Noisy(), 3), ckpt_path="nothing.ckpt")
    return True


def test_a_failed_save_is_raised_in_all_processes(three: dict[str, Any]):
    assert three["fail to save"] is True
