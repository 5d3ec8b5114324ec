from __future__ import annotations

import csv
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from loopwright.callbacks import ModelCheckpoint
from loopwright.loggers import CSVLogger
from loopwright.loggers.files import exists
from loopwright.loggers.folders import as_json
from tests.callbacks.scripted import Scripted, fit, loader


def read(logger: CSVLogger | str) -> list[dict[str, str]]:
    path = logger if isinstance(logger, str) else logger.metrics_file_path
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def header(logger: CSVLogger) -> str:
    return Path(logger.metrics_file_path).read_text().splitlines()[0]


def test_a_column_that_comes_later_loses_no_row():
    logger = CSVLogger("logs")
    logger.log_metrics({"epoch": 0, "loss": 0.5}, step=1)
    logger.save()
    logger.log_metrics({"epoch": 0, "val_loss": 0.25}, step=2)
    logger.save()
    logger.log_metrics({"loss": 1 / 3, "epoch": 1}, step=3)
    logger.finalize("success")
    assert header(logger) == "step,epoch,loss,val_loss"
    assert read(logger) == [
        {"step": "1", "epoch": "0", "loss": "0.5", "val_loss": ""},
        {"step": "2", "epoch": "0", "loss": "", "val_loss": "0.25"},
        {"step": "3", "epoch": "1", "loss": "0.3333333333333333", "val_loss": ""},
    ]


def test_known_columns_are_appended():
    logger = CSVLogger("logs", flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 1.0}, step=1)
    first = os.stat(logger.metrics_file_path)
    logger.log_metrics({"loss": 2.0}, step=2)
    second = os.stat(logger.metrics_file_path)
    assert second.st_ino == first.st_ino  # the same file grew
    assert second.st_size > first.st_size


def test_rows_reach_the_disk_every_so_many_steps():
    logger = CSVLogger("logs", flush_logs_every_n_steps=20)
    for step in range(7, 36, 7):
        logger.log_metrics({"loss": 1.0}, step)
        assert (len(read(logger)) if os.path.exists("logs") else 0) == (step // 21) * 3


def test_nothing_is_made_before_the_first_row():
    logger = CSVLogger("logs")
    assert logger.log_dir == os.path.join("logs", "loopwright_logs", "version_0")
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.state_dict()
    logger.finalize("failed")
    assert os.listdir() == []
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    assert sorted(os.listdir(logger.log_dir)) == ["hparams.json", "metrics.csv"]


def test_hyperparameters_without_a_row_are_written_at_the_end():
    logger = CSVLogger("logs")
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert os.listdir(logger.log_dir) == ["hparams.json"]


def test_hyperparameters_are_json():
    logger = CSVLogger("logs", version="a")
    logger.log_hyperparams(Namespace(lr=0.1, sizes=(1, 2), nested={"path": Path("x")}))
    logger.log_hyperparams(
        {"seed": 3, "device": torch.device("cpu"), "names": {"b", "a"}}
    )
    logger.log_hyperparams(
        {"labels": {numpy.int64(0): "cat", (1, 2): [{numpy.int64(3): None}], 4: "dog"}}
    )
    logger.finalize("success")
    assert json.loads(Path("logs/loopwright_logs/a/hparams.json").read_text()) == {
        "lr": 0.1,
        "sizes": [1, 2],
        "nested": {"path": "x"},
        "seed": 3,
        "device": "cpu",
        "names": ["a", "b"],
        "labels": {"0": "cat", "(1, 2)": [{"3": None}], "4": "dog"},
    }


def test_hyperparameters_are_plain_before_a_service_gets_them():
    """W&B fails for a key that is no text, and sorts runs by numbers, not by texts."""
    given = {4: numpy.float32(0.5), "n": numpy.int64(3), "t": torch.tensor(2.0)}
    plain = as_json({**given, "several": torch.tensor([1, 2])})
    assert plain == {"4": 0.5, "n": 3, "t": 2.0, "several": "tensor([1, 2])"}
    assert {type(value) for value in plain.values()} == {float, int, str}


@pytest.mark.parametrize(
    ("existing", "arguments", "folder"),
    [
        ([], {}, "loopwright_logs/version_0"),
        (
            ["version_0", "version_3", "version_x", "other_9", "version_12"],
            {},
            "loopwright_logs/version_13",
        ),
        (["version_3"], {"version": 1}, "loopwright_logs/version_1"),
        ([], {"version": "tuned"}, "loopwright_logs/tuned"),
        ([], {"name": "digits"}, "digits/version_0"),
        ([], {"name": None}, "version_0"),
        ([], {"name": ""}, "version_0"),
    ],
)
def test_numbered_folders(existing: list[str], arguments: dict[str, Any], folder: str):
    for name in existing:
        os.makedirs(os.path.join("logs", "loopwright_logs", name))
    logger = CSVLogger("logs", **arguments)
    assert logger.log_dir == os.path.join("logs", folder)
    assert logger.log_dir == logger.log_dir


def test_a_prefix_and_tensors():
    logger = CSVLogger("logs", prefix="train")
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 2}, step=1)  # type: ignore[dict-item] # it takes them
    logger.save()
    assert read(logger) == [{"step": "1", "train-loss": "0.5", "train-epoch": "2"}]
    with pytest.raises(ValueError, match="CSVLogger takes numbers; 'name' is 'x'"):
        logger.log_metrics({"name": "x"}, step=2)  # type: ignore[dict-item] # that is the point


@pytest.mark.parametrize("folder", ["logs", "runs.csv.d"])
def test_another_runs_file_is_kept_aside(caplog: pytest.LogCaptureFixture, folder: str):
    for value in (1.0, 2.0, 3.0):
        logger = CSVLogger(folder, version="same")
        logger.log_metrics({"loss": value}, step=1)
        logger.finalize("success")
    rows = [
        read(os.path.join(logger.log_dir, f"metrics{n}.csv"))[0]["loss"]
        for n in ("-1", "-2", "")
    ]
    assert rows == ["1.0", "2.0", "3.0"]
    path = os.path.join(folder, "loopwright_logs", "same", "metrics.csv")
    assert caplog.messages == [
        f"CSVLogger: {path} is another run's, and is kept as metrics-{n}.csv"
        for n in (1, 2)
    ]


def test_fit_then_test_write_one_file():
    logger = CSVLogger("logs")
    run = fit(logger=logger, max_epochs=1)
    run.test(dataloaders=loader(), verbose=False)
    rows = read(logger)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "4", "4"]
    assert [row["epoch"] for row in rows][:5] == ["0"] * 5
    assert rows[4]["val_loss"] == "3.0"
    assert rows[-1]["test_loss"] == "0.5"


@pytest.mark.parametrize(
    "saved_at", ["epoch=0-step=3", "epoch=0-step=4", "epoch=1-step=6"]
)
def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(saved_at: str):
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1)

    fit(
        keep(), logger=(killed := CSVLogger("logs"))
    )  # as if it had been: later rows and checkpoints are there
    expected = read(killed)
    resumed = CSVLogger("logs")
    fit(keep(), logger=resumed, ckpt_path=f"kept/{saved_at}.ckpt")
    assert resumed.version == 0
    assert os.listdir("logs/loopwright_logs") == ["version_0"]
    assert read(resumed) == expected


@pytest.mark.parametrize(
    "arguments", [{"save_dir": "others"}, {"version": 7}, {"name": "other"}]
)
def test_a_resumed_run_elsewhere_begins_anew(arguments: dict[str, Any]):
    first = CSVLogger("logs")
    fit(ModelCheckpoint("kept"), logger=first, max_epochs=1)
    os.makedirs("others/loopwright_logs/version_0")
    resumed = CSVLogger(**{"save_dir": "logs", **arguments})
    fit(
        ModelCheckpoint("kept"),
        logger=resumed,
        max_epochs=2,
        ckpt_path="kept/epoch=0-step=4.ckpt",
    )
    assert os.listdir("others/loopwright_logs/version_0") == []
    assert {row["step"] for row in read(first)} == {"1", "2", "3", "4"}
    assert {row["step"] for row in read(resumed)} == {"5", "6", "7", "8"}


def test_rows_before_a_checkpoint_are_on_disk_with_it():
    class Killed(Scripted):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 3:
                os._exit(9)

    child = os.fork()
    if child == 0:
        fit(
            ModelCheckpoint("kept", every_n_train_steps=2),
            module=Killed(),
            logger=CSVLogger("logs"),
        )
    assert os.waitpid(child, 0)[1] >> 8 == 9
    assert [row["step"] for row in read(CSVLogger("logs", version=0))] == ["1", "2"]


def test_remote_folders():
    logger = CSVLogger("memory://bucket/logs", name="run")
    logger.log_hyperparams({"lr": 0.1})
    for step in (1, 2, 3):
        logger.log_metrics(
            {"loss": float(step), **({"late": 1.0} if step == 3 else {})}, step
        )
        logger.save()
    import fsspec

    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/bucket/logs/run/version_0/metrics.csv").decode().split() == [
        "step,loss,late", "1,1.0,", "2,2.0,", "3,3.0,1.0",
    ]  # fmt: skip
    assert CSVLogger("memory://bucket/logs", name="run").version == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"version": 1.5}, TypeError), ({"flush_logs_every_n_steps": 0}, ValueError)],
)
def test_bad_arguments_raise_at_construction(
    arguments: dict[str, Any], error: type[Exception]
):
    with pytest.raises(error, match=f"{next(iter(arguments))} must be"):
        CSVLogger("logs", **arguments)


def test_a_subclass_may_name_the_run():
    """By properties of its own, as the Logger's contract has them."""

    class Named(CSVLogger):
        @property
        def name(self) -> str:
            return "mine"

        @property
        def save_dir(self) -> str:
            return "elsewhere"

    logger = Named("logs", version=0)
    assert logger.log_dir == "elsewhere/mine/version_0"
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert Path("elsewhere/mine/version_0/metrics.csv").is_file()


@pytest.mark.parametrize("version", [7, "job-7"])
def test_a_subclass_may_name_the_run_by_its_version(version: Any):
    """Two runs of that name go into that folder, and there is no other."""

    class Named(CSVLogger):
        @property
        def version(self) -> Any:
            return version

    folder = Path("logs", "loopwright_logs", "version_7" if version == 7 else version)
    for _ in range(2):
        logger = Named("logs")
        fit(logger=logger, enable_checkpointing=False, module=Scripted())
        assert logger.log_dir == str(folder)
        assert [*folder.parent.iterdir()] == [folder]


class Simple(MemoryFileSystem):
    """A store that cannot make a file only where none is."""

    protocol = "simple"

    def pipe_file(self, path: str, value: bytes) -> None:  # what it lacks
        super().pipe_file(path, value)


def test_a_store_that_cannot_make_a_file_only_where_none_is():
    """Runs one after the other have folders of their own all the same."""
    fsspec.register_implementation("simple", Simple, clobber=True)
    loggers = [CSVLogger("simple://bucket/logs", name="run") for _ in range(2)]
    for logger in loggers:
        fit(logger=logger, enable_checkpointing=False, module=Scripted())
    assert [logger.version for logger in loggers] == [0, 1]
    assert all(exists(logger.metrics_file_path) for logger in loggers)


def test_rows_without_a_step_are_numbered():
    logger = CSVLogger("logs")
    for values, step in (({"a": 1.0}, None), ({"a": 2.0}, 7), ({"a": 3.0}, None)):
        logger.log_metrics(values, step)
    logger.finalize("success")
    assert [row["step"] for row in read(logger)] == ["0", "7", "8"]
