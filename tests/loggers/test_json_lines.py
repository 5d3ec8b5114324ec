from __future__ import annotations

import json
from pathlib import Path

import pytest

from loopwright.callbacks import ModelCheckpoint
from loopwright.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from loopwright.loggers.files import read_text
from tests.callbacks.scripted import fit, trainer


def read(logger: JSONLinesLogger) -> list[dict[str, object]]:
    text = read_text(logger.metrics_file_path)
    return [json.loads(line) for line in text.splitlines()]


def test_a_resumed_run_has_each_step_once():
    every_step = ModelCheckpoint(save_top_k=-1, every_n_train_steps=3)
    first = JSONLinesLogger("logs")
    fit(every_step, logger=first, max_epochs=2)
    whole = read(first)
    # As a kill leaves it.
    with open(first.metrics_file_path, "a") as file:
        file.write('{"step": 9, "trai')
    checkpoint = f"{first.log_dir}/checkpoints/epoch=0-step=3.ckpt"
    second = JSONLinesLogger("logs")
    fit(logger=second, max_epochs=2, ckpt_path=checkpoint)
    assert second.version == first.version
    assert read(second) == whole
    assert [row["step"] for row in whole if "train_loss" in row] == [*range(1, 9)]


def test_what_is_no_number_is_written_as_it_is():
    logger = JSONLinesLogger("logs", prefix="run")
    logger.log_metrics({"text": "a", "parts": {"b": 1.0}, "none": None}, step=2)  # type: ignore[dict-item]
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert read(logger) == [
        {"step": 2, "run-text": "a", "run-parts": {"b": 1.0}, "run-none": None}
    ]
    assert json.loads(Path(logger.log_dir, "hparams.json").read_text()) == {"lr": 0.1}


def test_another_runs_file_in_a_given_version_is_kept_aside_and_at_a_url():
    """As a CSVLogger keeps it: one file never has the rows of two runs."""
    for save_dir in ("logs", "memory://bucket/lines"):
        for step in (1, 2):
            logger = JSONLinesLogger(save_dir, version=0)
            logger.log_metrics({"a": 1.0}, step)
            logger.finalize("success")
        assert [row["step"] for row in read(logger)] == [2]
        (first,) = read_text(f"{logger.log_dir}/metrics-1.jsonl").splitlines()
        assert json.loads(first)["step"] == 1


def test_loggers_by_name():
    made = trainer(logger=["tensorboard", "CSV", JSONLinesLogger("own")])
    assert [type(logger) for logger in made.loggers] == [
        TensorBoardLogger,
        CSVLogger,
        JSONLinesLogger,
    ]
    assert made.loggers[0].save_dir == made.default_root_dir
    assert type(trainer(logger="jsonl").logger) is JSONLinesLogger
    with pytest.raises(ValueError, match=r"one of comet, csv, .*; got 'tensorbord'"):
        trainer(logger="tensorbord")
