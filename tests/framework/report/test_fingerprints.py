"""``Trainer(fingerprint=n)``: what the record keeps, and processes whose parameters do not stay equal."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback
from loopwright.framework import Module, Trainer
from loopwright.framework.report.fingerprint import as_hex, fingerprint
from tests.strategies.distributed import all_in_processes, in_processes, quiet


class Net(Module):
    """A small net; in one process, one bit of a parameter changes after a step.

    Args:
        rank: the process.
        step: the step, -1 for never.
    """

    def __init__(self, rank: int = 0, step: int = -1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 1)
        self.rank, self.step = rank, step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.head(self.body(x)), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            self.head.weight.data.view(torch.int32)[0, 5] ^= 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(num_batches: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(4 * num_batches, 8, generator=generator),
        torch.randn(4 * num_batches, 1, generator=generator),
    )
    return DataLoader(data, 4, shuffle=True)


def lines_of(trainer: Trainer) -> list[dict[str, Any]]:
    assert trainer.record_dir is not None
    text = Path(trainer.record_dir, "fingerprints.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


class After(Callback):
    """Notes what there is right after each step."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, *_: Any
    ) -> None:
        parameters = [*pl_module.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        found = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "loss": struct.pack(">d", float(outputs["loss"])).hex(),
            "parameters": as_hex(fingerprint(parameters)),
            "gradients": as_hex(fingerprint(gradients)),
        }
        # The next batch of a window adds to the gradients.
        self.found.setdefault(trainer.global_step, found)


def train(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = quiet(logger="csv", default_root_dir=folder, fingerprint=5, **options)
    trainer.fit(Net(), loader(), ckpt_path=None)
    return trainer


def test_the_record_has_loss_gradients_and_parameters_right_after_each_nth_step(
    tmp_path: Path,
):
    after = After()
    options: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.1}
    trainer = train(tmp_path, callbacks=after, accumulate_grad_batches=2, **options)
    first, *lines = lines_of(trainer)
    torch.manual_seed(0)
    assert first == {
        "step": 0,
        "epoch": 0,
        "loss": None,
        "parameters": as_hex(fingerprint(Net().parameters())),
        "gradients": None,
    }
    assert lines == [after.found[step] for step in (5, 10, 15, 20)]
    # Another run of the same is the same to the last bit.
    again = train(tmp_path, accumulate_grad_batches=2, **options)
    assert lines_of(again) == [first, *lines]


def test_a_run_that_is_resumed_has_the_lines_of_one_that_was_not_stopped(
    tmp_path: Path,
):
    whole = train(tmp_path / "whole", max_steps=22)
    cut = train(tmp_path / "cut", max_steps=12)
    path = tmp_path / "cut.ckpt"
    cut.save_checkpoint(path)
    # It goes on to step 15 and is then gone; the next one begins at 12, in the same folder.
    cut.max_steps = 17
    cut.fit(cut.module, loader())
    resumed = quiet(
        logger="csv", default_root_dir=tmp_path / "cut", fingerprint=5, max_steps=22
    )
    resumed.fit(Net(), loader(), ckpt_path=path)
    assert resumed.record_dir == cut.record_dir
    assert [line["step"] for line in lines_of(resumed)] == [0, 5, 10, 15, 20]
    assert lines_of(resumed) == lines_of(whole)


def test_without_a_record_it_says_so_and_nonsense_is_refused(caplog: Any):
    quiet(fingerprint=5, max_steps=6).fit(Net(), loader())
    assert "fingerprint=5: fingerprints are kept nowhere" in caplog.text
    with pytest.raises(ValueError, match="fingerprint must be"):
        quiet(fingerprint=0)


# With several processes.


def disturbed(rank: int, step: int) -> list[tuple[int, str]]:
    """At which step each process ended, and with which error."""
    trainer = quiet(strategy="ddp", fingerprint=5, max_epochs=2)
    error = ""
    try:
        trainer.fit(Net(rank, step), loader(48))
    except RuntimeError as raised:
        error = str(raised)
    return trainer.strategy.gather_objects((trainer.global_step, error))


def undisturbed(strategy: str, folder: str) -> list[dict[str, Any]]:
    trainer = train(Path(folder, strategy), strategy=strategy)
    return lines_of(trainer) if trainer.is_global_zero else []


def test_one_flipped_bit_of_one_process_ends_all_within_n_steps_and_is_named(
    tmp_path: Path,
):
    found = all_in_processes(
        2,
        {
            "disturbed": (disturbed, 1, 7),
            "ddp": (undisturbed, "ddp", str(tmp_path)),
            "fsdp": (undisturbed, "fsdp", str(tmp_path)),
        },
    )
    (_, of_other), (step, of_guilty) = found["disturbed"]
    assert step == 10
    assert of_guilty.startswith("this process, rank 1 departs from rank 0")
    assert of_other.startswith("rank 1 departs from rank 0")
    for text in (of_guilty, of_other):
        assert "1 of 6 differ, the first is 'head.weight': 1 of 16 numbers" in text
        assert "at [0, 5]" in text
        assert "global step 10" in text
        assert "At step 5 all were equal" in text
    # Buffers of batch norms differ between replicas, and are no alarm; shards give what replicas do.
    assert [line["step"] for line in found["ddp"]] == [0, 5, 10]
    assert found["fsdp"] == found["ddp"]
    assert len(found["ddp"][1]["losses"]) == 2


@pytest.mark.slow
def test_of_three_processes_the_majority_tells_which_one_departs():
    for _, text in in_processes(3, disturbed, 0, 7):
        assert "rank 0 departs from the other processes" in text
        assert "cannot be told" not in text
