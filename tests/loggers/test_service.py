"""What all loggers of services share, on a service that keeps its rows in a list and can be away."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwright.callbacks import ModelCheckpoint
from loopwright.loggers import sender
from loopwright.loggers.journal import Journal
from loopwright.loggers.service import ServiceLogger
from tests.callbacks.scripted import fit

# What the service holds: by run, the rows in the order in which they came.
SERVICE: dict[str, list[tuple[int, dict[str, Any]]]] = {}


class Away(Exception):
    """The service cannot be reached."""


class ListLogger(ServiceLogger):
    """Writes to :data:`SERVICE`."""

    refusal: Exception = ValueError("bad")

    def __init__(
        self, version: str | None = None, is_away: bool = False, **kwargs: Any
    ) -> None:
        self.is_away = is_away
        options = {"save_dir": "rows", "prefix": "", "log_model": False, **kwargs}
        super().__init__("project", run_id=version, **options)
        self.others: list[Any] = []

    def begin(self) -> tuple[Any, str]:
        self.check()
        run = self._run_id or f"run{len(SERVICE)}"
        return SERVICE.setdefault(run, []), run

    def check(self) -> None:
        if self.is_away:
            raise Away("no answer")

    def send_metrics(self, rows: list[dict[str, Any]]) -> None:
        self.check()
        for row in rows:
            if row["values"].get("bad"):
                raise self.refusal
            self._experiment.append((row["step"], row["values"]))

    def send_hparams(self, values: dict[str, Any]) -> None:
        self.check()
        self.others.append(values)

    def send_checkpoint(self, path: str, row: dict[str, Any]) -> None:
        self.others.append((Path(path).name, Path(path).exists(), row["aliases"]))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    SERVICE.clear()
    monkeypatch.setattr(sender, "SEND_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(sender, "MAX_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(sender, "FAILING_SECONDS", 0.1)


def losses(run: str) -> list[int]:
    return [step for step, values in SERVICE[run] if "train_loss" in values]


def test_a_resumed_run_has_each_step_once():
    """The service was given what came after the checkpoint, and cannot take it back."""
    every = ModelCheckpoint(dirpath="saved", save_top_k=-1, every_n_train_steps=3)
    fit(every, logger=ListLogger(), max_epochs=2)
    whole = list(SERVICE["run0"])
    second = ListLogger()
    fit(logger=second, max_epochs=3, ckpt_path="saved/epoch=0-step=3.ckpt")
    assert list(SERVICE) == ["run0"]
    assert SERVICE["run0"][: len(whole)] == whole
    assert losses("run0") == [*range(1, 13)]
    lines = Path("rows/project/run0/rows.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [r["step"] for r in kept if "train_loss" in r.get("values", ())] == [
        *range(1, 13)
    ]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_service_that_is_away_loses_no_row(
    from_the_start: bool, caplog: pytest.LogCaptureFixture
):
    logger = ListLogger(is_away=from_the_start)
    logger.claim()
    logger.is_away = True
    if from_the_start:
        # What takes every call stands for the service.
        logger.experiment.whatever()
    logger.log_hyperparams({"nested": {"lr": 0.1}, "function": torch.sin})
    fit(logger=logger, max_epochs=2)
    said = [r.message for r in caplog.records if "ListLogger" in r.message]
    assert [text.split(":")[0] for text in said] == [
        "ListLogger cannot reach its service (Away",
        "ListLogger",
    ]
    # A row for each step, validation and epoch, and the hyperparameters; the graph comes first.
    assert "12 rows are not sent (no answer)" in said[1]
    folder = said[1].split("They are in ")[1].split("/rows.jsonl")[0]
    assert all(not rows for rows in SERVICE.values())
    # The program ends here; another one sends them.
    later = ListLogger()
    assert later.send_rows(folder)
    assert losses("run0") == [*range(1, 9)]
    assert later.others[0]["nested"] == {"lr": 0.1}


def test_a_service_that_comes_back(caplog: pytest.LogCaptureFixture):
    logger = ListLogger()
    for step in range(6):
        logger.is_away = 1 < step < 4
        logger.log_metrics({"train_loss": 0.5}, step)
        logger.claim()
        assert logger.experiment is SERVICE["run0"]
    logger.finalize("success")
    assert losses("run0") == [*range(6)]
    assert [r.message.split("service")[0] for r in caplog.records] == [
        "ListLogger cannot reach its ",
        "ListLogger reaches its ",
    ]


# The last is a fault in a service's library: to try again would never help.
@pytest.mark.parametrize("refusal", [ValueError(), AttributeError("'x' has no 'y'")])
def test_a_row_that_the_service_refuses(
    refusal: Exception, caplog: pytest.LogCaptureFixture
):
    logger = ListLogger()
    logger.refusal = refusal
    for step, bad in enumerate((False, True, False, True)):
        row: dict[str, Any] = {"train_loss": torch.tensor(1.0), "bad": bad}
        logger.log_metrics(row, step)
    logger.finalize("success")
    assert losses("run0") == [0, 2]
    (said,) = [r.message for r in caplog.records]
    assert "does not take a row (metrics, step 1)" in said


def test_an_answer_that_cannot_be_read_is_no_refusal():
    """Such as a proxy's page: the row is sent again."""
    logger = ListLogger()
    assert not logger.is_refused(json.JSONDecodeError("no value", "<html>", 0))
    # Requests derives its own from both kinds.
    assert not logger.is_refused(type("Both", (OSError, ValueError), {})())
    assert logger.is_refused(FileNotFoundError("checkpoint.ckpt"))


def test_rows_that_no_file_takes_are_sent_once_one_does(
    monkeypatch: pytest.MonkeyPatch,
):
    """As on a disk that is full for a while."""
    append, failures = Journal.append, [OSError("no space left"), None]

    def append_later(self: Journal, rows: list[Any]) -> None:
        if failures and (failure := failures.pop(0)):
            raise failure
        append(self, rows)

    monkeypatch.setattr(Journal, "append", append_later)
    logger = ListLogger()
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.finalize("success")
    logger.log_metrics({"train_loss": 1.0}, 2)
    logger.finalize("success")
    assert losses("run0") == [1, 2]
    kept = Path("rows/project/run0/rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


def test_a_kill_may_cut_short_what_is_kept():
    logger = ListLogger()
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.finalize("success")
    with open("rows/project/run0/rows.jsonl", "a") as file:
        file.write('{"kind": "metr')
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"train_loss": 1.0}, 2)
    copy.finalize("success")
    assert losses("run0") == [1, 2]
    assert Path("rows/project/run0/rows.jsonl").read_text().count("\n") == 2


def test_another_project_or_version_is_another_run():
    saved = ModelCheckpoint(dirpath="saved", save_last=True)
    fit(saved, logger=ListLogger(), max_epochs=1)
    fit(logger=ListLogger("mine"), max_epochs=2, ckpt_path="saved/last.ckpt")
    assert list(SERVICE) == ["run0", "mine"]
    assert losses("mine") == [*range(5, 9)]


@pytest.mark.parametrize(("log_model", "uploads"), [("all", 3), (True, 1), (False, 0)])
def test_checkpoints_are_uploaded(log_model: bool | str, uploads: int):
    logger = ListLogger(log_model=log_model)
    fit(ModelCheckpoint(dirpath="saved", monitor="val_loss"), logger=logger)
    assert len(logger.others) == uploads
    # Each was there when it was sent, though only the best is kept.
    assert all(exists for _, exists, _ in logger.others)
    if uploads:
        name, _, aliases = logger.others[-1]
        assert (name, aliases) == ("epoch=2-step=12.ckpt", ["latest", "best"])


def test_log_model_is_checked():
    with pytest.raises(ValueError, match='log_model must be True, False or "all"'):
        ListLogger(log_model="best")
