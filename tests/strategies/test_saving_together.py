"""Saving with two processes when one of them fails at it: both go on, or both end."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import Engine, Module, Trainer
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.strategies.launch.processes import find_peers, one_is_gone
from tests.strategies.distributed import in_processes, quiet


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(24.0)[:, None] / 24), 2)


class Net(Module):
    """Its ``on_save_checkpoint`` raises ``error`` on one rank at the second save."""

    def __init__(
        self, error: Exception | None = None, rank: int = 0, at_end: bool = False
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.error, self.rank, self.at_end = error, rank, at_end

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(batch[0]) - 1).square().mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (
            self.error is not None
            and self.global_rank == self.rank
            and self.trainer.global_step == 4
        ):
            raise self.error

    def on_train_end(self) -> None:
        if self.at_end and self.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Uploads(ModelCheckpoint):
    """Saves in a way of its own, in whose last part the main process fails at the second save."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.save_checkpoint(filepath)
        if trainer.global_step == 4 and trainer.is_global_zero:
            raise ConnectionError("the bucket is gone")


class Parts(ModelCheckpoint):
    """Keeps one, of which each process writes a part; one of them cannot at the second save."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.save_checkpoint(filepath)
        if trainer.global_step == 4 and not trainer.is_global_zero:
            raise OSError("no room")


class Unlisted(ModelCheckpoint):
    """The same, where what follows fails: the pointer."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.save_checkpoint(filepath)
        if trainer.global_step == 4:
            self._on_complete = self.refuse

    def refuse(self) -> None:
        raise ConnectionError("the index is gone")


def outcome(module: Module, callback: ModelCheckpoint) -> list[str]:
    """By rank: how a fit ended, and the checkpoint that counts in the end."""
    trainer = quiet(enable_checkpointing=True, callbacks=[callback])
    try:
        trainer.fit(module, data())
    except (Exception, SystemExit) as error:
        ended = f"{type(error).__name__}: {error}"
    else:
        ended = "finished"
    return trainer.strategy.gather_objects(
        f"{ended} {os.path.basename(callback.best_model_path)}"
    )


def checkpoints(
    folder: Path,
    name: str,
    kind: type[ModelCheckpoint] = ModelCheckpoint,
    **arguments: Any,
) -> Any:
    keep = 1 if kind is Parts else -1
    return kind(
        folder / name,
        every_n_train_steps=2,
        save_last=True,
        save_top_k=keep,
        **arguments,
    )


def failures(folder: Path) -> dict[str, list[str]]:
    warn: dict[str, Any] = {"on_save_error": "warn"}
    return {
        "warned": outcome(
            Net(OSError("no hook")), checkpoints(folder, "warned", **warn)
        ),
        "raised": outcome(Net(OSError("no hook")), checkpoints(folder, "raised")),
        "rank 1": outcome(
            Net(OSError("no hook"), rank=1), checkpoints(folder, "rank 1", **warn)
        ),
        "part": outcome(Net(), checkpoints(folder, "part", Parts)),
        "uploads": outcome(Net(), checkpoints(folder, "uploads", Uploads, **warn)),
        "unlisted": outcome(Net(), checkpoints(folder, "unlisted", Unlisted, **warn)),
        "signal": outcome(Net(rank=1, at_end=True), checkpoints(folder, "signal")),
        "peers": [
            f"{len(find_peers())} {one_is_gone(find_peers())} {one_is_gone(find_peers() | {1})}"
        ],
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], Path]:
    folder = tmp_path_factory.mktemp("saving")
    return in_processes(2, failures, folder), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["warned", "rank 1", "uploads"])
def test_both_go_on_without_a_checkpoint_that_one_could_not_save(
    told: tuple[dict[str, list[str]], Path], name: str
):
    assert told[0][name] == ["finished epoch=0-step=6.ckpt"] * 2
    assert load_checkpoint(str(told[1] / name / "last.ckpt"))["global_step"] == 6
    assert (
        load_checkpoint(str(told[1] / name / "epoch=0-step=2.ckpt"))["global_step"] == 2
    )


@pytest.mark.slow
def test_both_end_with_an_error_that_says_whose_it_was(
    told: tuple[dict[str, list[str]], Path],
):
    place = f"could not save '{told[1]}/{{}}/epoch=0-step=4.ckpt'"
    assert told[0]["raised"] == [
        "OSError: no hook epoch=0-step=2.ckpt",
        f"OSError: rank 0 {place.format('raised')}: OSError: no hook epoch=0-step=2.ckpt",
    ]
    assert told[0]["part"] == [
        f"OSError: rank 1 {place.format('part')}: OSError: no room epoch=0-step=2.ckpt",
        "OSError: no room epoch=0-step=2.ckpt",
    ]
    assert (
        load_checkpoint(str(told[1] / "part" / "epoch=0-step=2.ckpt"))["global_step"]
        == 2
    )


@pytest.mark.slow
def test_what_follows_a_save_of_ones_own_may_fail(
    told: tuple[dict[str, list[str]], Path],
):
    assert told[0]["unlisted"] == ["finished epoch=0-step=6.ckpt"] * 2


@pytest.mark.slow
def test_a_signal_to_one_of_them_after_the_last_step_ends_both(
    told: tuple[dict[str, list[str]], Path],
):
    assert told[0]["signal"] == ["SystemExit: 143 epoch=0-step=6.ckpt"] * 2


@pytest.mark.slow
def test_processes_know_whether_their_peers_live(
    told: tuple[dict[str, list[str]], Path],
):
    assert told[0]["peers"] == ["2 False True"]


def one_after_another() -> list[Any]:
    """A Trainer that is collected in one process and not in the other; an Engine that ends; and another Trainer."""
    gc.disable()
    first = quiet()
    first.fit(Net(), data())
    engine = Engine(accelerator="cpu", launch=False)
    engine.connect()
    kept = [first] if first.global_rank == 0 else []
    del first
    gc.collect()
    engine.end_training()
    joined = dist.is_initialized()
    last = quiet(max_epochs=2)
    last.fit(Net(), data())
    del kept
    return last.strategy.gather_objects((joined, last.global_step))


@pytest.mark.slow
def test_processes_leave_their_group_together():
    assert in_processes(2, one_after_another) == [(True, 12)] * 2
