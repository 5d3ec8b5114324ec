"""Loggers of services under Lightning's names, beside Lightning's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loopwright.framework.compat.lightning.loggers import (
    CometLogger,
    MLFlowLogger,
    WandbLogger,
)
from loopwright.framework.compat.lightning.utilities import MisconfigurationException
from tests.programs import run_program

PROGRAM = """
import json
import sys
import torch
from glob import glob
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from mlflow.tracking import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore


class Model(LightningModule):
    def __init__(self, lr=0.1, nested=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


board = WandbLogger(project="both", save_dir="board", offline=True)
store = MLFlowLogger("both", tracking_uri="sqlite:///store.db", artifact_location="artifacts", log_model=True)
trainer = Trainer(
    max_epochs=2, logger=[board, store], log_every_n_steps=1, num_sanity_val_steps=0, enable_progress_bar=False,
    enable_model_summary=False, accelerator="cpu", default_root_dir="root",
)
batches = torch.utils.data.DataLoader(torch.arange(12.0).reshape(6, 2) / 10, batch_size=2)
torch.manual_seed(0)
trainer.fit(Model(nested={"a": 1}), batches, batches)
board.experiment.finish()

client = MlflowClient("sqlite:///store.db")
run = client.get_run(store.run_id)
points = {
    name: [(point.step, point.value) for point in client.get_metric_history(store.run_id, name)]
    for name in run.data.metrics
}
rows = []
(path,) = glob("board/wandb/offline-run-*/*.wandb")
data = DataStore()
data.open_for_scan(path)
while (found := data.scan_data()) is not None:
    record = Record()
    record.ParseFromString(found)
    row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
    rows += [{name: value for name, value in row.items() if name[0] != "_"}] if row else []
(folder,) = [artifact.path for artifact in client.list_artifacts(store.run_id) if artifact.path != "model.txt"]
files = sorted(artifact.path for artifact in client.list_artifacts(store.run_id, folder))
status = run.info.status
print("FOUND", json.dumps([rows, points, run.data.params, status, files, board.name, board.save_dir]))
"""


def found(output: str) -> Any:
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    # Means are added up in another order.
    return json.loads(
        line.removeprefix("FOUND"), parse_float=lambda text: round(float(text), 6)
    )


@pytest.mark.slow
def test_services_get_what_lightnings_loggers_give_them(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    results = []
    for number, start in enumerate(((), ("-m", "loopwright.lightning"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        ran = run_program(*start, "../program.py", cwd=folder, timeout=180)
        assert ran.returncode == 0, ran.stderr
        results.append(found(ran.stdout))
    there, here = results
    assert here == there


def test_what_is_checked_when_a_logger_is_made():
    with pytest.raises(MisconfigurationException, match="in offline mode"):
        WandbLogger(offline=True, log_model=True)
    assert WandbLogger().name == os.environ.get("WANDB_PROJECT", "lightning_logs")
    assert WandbLogger(project="a", version="b").version == "b"
    store = MLFlowLogger("a", tracking_uri="http://127.0.0.1:1", save_dir="b")
    assert store.save_dir is None
    with pytest.raises(TypeError, match="positional"):
        CometLogger("key")  # type: ignore[call-arg] # it takes names only
