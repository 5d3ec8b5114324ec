"""The services' loggers, read back by the services' own libraries."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import zipfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.loggers import CSVLogger, MLFlowLogger
from tests.callbacks.scripted import BATCHES, fit, loader, trainer
from tests.loggers import services_program
from tests.programs import run_program

Points = dict[str, list[tuple[int, float]]]
"""Steps and values, by name."""


def of_rows(rows: Iterator[dict[str, Any]], step: str = "step") -> Points:
    points: Points = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith("_loss") and value not in (None, ""):
                points.setdefault(name, []).append((int(row[step]), float(value)))
    return points


def wandb_rows() -> Iterator[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore # made at run time
    from wandb.sdk.internal.datastore import DataStore

    for path in glob("wandb_here/wandb/offline-run-*/*.wandb"):
        store = DataStore()
        store.open_for_scan(path)
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            items = record.history.item
            if items:
                keys = [item.key or "/".join(item.nested_key) for item in items]
                values = [json.loads(item.value_json) for item in items]
                yield dict(zip(keys, values, strict=True))


def comet_messages() -> list[dict[str, Any]]:
    (archive,) = glob("comet_here/*.zip")
    with zipfile.ZipFile(archive) as file:
        lines = file.read("messages.json").decode().splitlines()
    return [json.loads(line) for line in lines]


def comet_rows() -> Iterator[dict[str, Any]]:
    for message in comet_messages():
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            yield {metric["metricName"]: metric["metricValue"], "step": metric["step"]}


def tensorboard_points() -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = glob("board/*/*")
    events = EventAccumulator(folder).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.endswith("_loss")
    }


def mlflow_points(store: str = "") -> tuple[Points, Any]:
    """Those of the default store, or of another one."""
    from mlflow.tracking import MlflowClient

    # MLflow keeps a store open by its name, which says nothing of the folder that it is relative to.
    default = f"sqlite:///{os.path.abspath('mlflow_here/mlflow.db')}"
    client = MlflowClient(store or default)
    experiment = client.get_experiment_by_name("loopwright_logs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = {
        name: [
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
        if name.endswith("_loss")
    }
    return points, run


def trackio_rows() -> list[dict[str, Any]]:
    # In a process of its own: the library knows the folder that was set when it was imported.
    program = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("all")
print(json.dumps(SQLiteStorage.get_logs("all", run["name"], run_id=run["id"])))
"""
    ended = run_program("-c", program, timeout=250)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# Importing the libraries of four services takes most of it: twenty seconds each time, a minute on a busy machine.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_at_every_service(monkeypatch: pytest.MonkeyPatch):
    """With the steps and values of one that was not killed, each once."""
    monkeypatch.setenv("TRACKIO_DIR", os.path.abspath("trackio_here"))
    # MLflow gives its store of plain files up, and takes one only if it is told to.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    reference = CSVLogger("reference")
    made = trainer(logger=reference)
    torch.manual_seed(0)
    made.fit(services_program.Showing(), loader(), loader(2))
    made.test(dataloaders=loader(2), verbose=False)
    with open(reference.metrics_file_path) as file:
        expected = of_rows(csv.DictReader(file))
    assert [step for step, _ in expected["train_loss"]] == [*range(1, 13)]

    program = ("-m", "tests.loggers.services_program")
    root = str(Path(services_program.__file__).parents[2])
    path = os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "COMET_LOGGING_CONSOLE": "ERROR"}
    step = random.randint(5, 11)
    killed = run_program(*program, env={**environment, "KILL": str(step)}, timeout=250)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = run_program(*program, env=environment, timeout=250)
    assert whole.returncode == 0, whole.stderr

    assert of_rows(wandb_rows(), "trainer/global_step") == expected
    assert of_rows(comet_rows()) == expected
    rows_of_trackio = trackio_rows()
    assert of_rows(iter(rows_of_trackio)) == expected
    points, run = mlflow_points()
    assert points == expected
    of_files, _ = mlflow_points(os.path.abspath("files"))
    assert of_files == expected
    assert tensorboard_points() == expected
    (path,) = glob("csv/*/*/metrics.csv")
    with open(path) as file:
        assert of_rows(csv.DictReader(file)) == expected
    (path,) = glob("lines/*/*/metrics.jsonl")
    with open(path) as file:
        assert of_rows(map(json.loads, file)) == expected

    # Hyperparameters, and what was shown.
    assert run.data.params == {"lr": "0.1", "nested/name": "sgd"}
    assert run.info.status == "FINISHED"
    shown = {name for row in wandb_rows() for name in row if "/_type" in name}
    assert shown == {
        f"{each}/_type" for each in ("image", "text", "table", "histogram")
    }
    shown = {name for row in rows_of_trackio for name in row}
    assert shown >= {"image", "text", "table", "histogram"}
    kinds = {message["type"] for message in comet_messages()}
    assert kinds >= {"parameter_msg", "file_upload", "graph"}


class GoesBack(Callback):
    """Once, from the last batch of the first epoch to before the third."""

    phase = "decide"
    has_gone = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == BATCHES - 1 and not self.has_gone:
            self.has_gone = True
            trainer.rewind([(0, 2)])


@pytest.mark.slow
def test_a_run_that_goes_back_goes_on_at_the_service():
    saves = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    logger = MLFlowLogger(save_dir="mlflow_here")
    fit(GoesBack(), saves, logger=logger, max_epochs=1, validate=False)
    points, _ = mlflow_points()
    # MLflow removes nothing: what was taken back stays beside what the run has in its place.
    assert sorted(step for step, _ in points["train_loss"]) == [1, 2, 3, 3, 4]
