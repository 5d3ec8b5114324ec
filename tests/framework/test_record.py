"""The record of a run: what it holds, that it survives a resume and a disk, and that no secret is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Trainer
from tests.framework.models import Evaluated


class Net(Evaluated):
    """Logs its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


def data(samples: int = 32, batch_size: int = 4) -> DataLoader[Any]:
    x = torch.arange(2.0 * samples).reshape(samples, 2) / samples
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size)


def trainer(folder: Path, **options: Any) -> Trainer:
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": folder,
        "logger": "jsonl",
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**usual, **options})


def run_of(trainer: Trainer) -> dict[str, Any]:
    assert trainer.record_dir is not None
    return json.loads((Path(trainer.record_dir) / "run.json").read_text())


def rows_of(trainer: Trainer, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    assert trainer.record_dir is not None
    lines = (Path(trainer.record_dir) / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


class Dies(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("poison")


def test_a_fit_leaves_its_record(tmp_path: Path):
    fit = trainer(tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2)
    fit.fit(Net(), data(), data())
    run = run_of(fit)
    assert run["schema"] == 1
    assert run["config"]["trainer"]["gradient_clip_val"] == 0.5
    assert run["batch"] == {
        "per_device": 4, "processes": 1, "accumulate": 2, "effective": 8, "micro_batch": None,
    }  # fmt: skip
    assert run["model"]["parameters"] == 3
    assert run["packages"]["numpy"]
    assert run["git"]["commit"]
    assert [epoch["epoch"] for epoch in run["timings"]["epochs"]] == [0, 1]
    assert run["timings"]["run"]["step"] > 0
    assert run["ended"]["why"] == "max_epochs=2"
    kept = [each for each in run["checkpoints"] if not each.get("removed")]
    assert [each["path"] for each in kept] == [fit.checkpoint_callback.best_model_path]
    assert "val_loss" in kept[0]["scores"]
    steps = [row for row in rows_of(fit) if "loss" in row["values"]]
    assert [row["step"] for row in steps] == [*range(1, 9)]
    last = steps[-1]["values"]
    measured = {name.removeprefix("monitor/") for name in last if "monitor/" in name}
    assert {"grad_norm", "lr/SGD", "data_wait", "memory"} <= measured
    assert {"samples_per_second", "steps_per_second"} <= measured


def test_a_resumed_run_has_each_step_once(tmp_path: Path):
    save = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    first = trainer(tmp_path, callbacks=[save, Dies(11)])
    with pytest.raises(RuntimeError, match="poison"):
        first.fit(Net(), data(), data())
    ended = run_of(first)["ended"]
    assert (ended["how"], ended["step"]) == ("failed", 11)
    assert "poison" in ended["why"]
    second = trainer(tmp_path, callbacks=[ModelCheckpoint(every_n_train_steps=3)])
    second.fit(Net(), data(), data(), ckpt_path="last")
    assert second.record_dir == first.record_dir
    rows = rows_of(second)
    losses = [row["step"] for row in rows if "loss" in row["values"]]
    assert losses == [*range(1, 17)]
    assert sum("val_loss" in row["values"] for row in rows) == 2
    run = run_of(second)
    assert [each["first_step"] for each in run["attempts"]] == [0, 9]
    assert run["attempts"][0]["ended"]["how"] == "failed"
    assert run["ended"]["how"] == "finished"


def test_there_is_none_where_nobody_wants_it(tmp_path: Path):
    for options in (
        {"enable_record": False}, {"logger": False}, {"fast_dev_run": True}, {"barebones": True, "logger": None},
    ):  # fmt: skip
        fit = trainer(tmp_path, **{"max_steps": 1, **options})
        fit.fit(Net(), data())
        assert fit.record_dir is None
    assert not list(tmp_path.rglob("record"))
