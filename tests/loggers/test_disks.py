"""Loggers that write files, on a disk that takes nothing for a while, or where their folder goes away."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopwright.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from loopwright.loggers.folders import FolderLogger
from tests.loggers.test_csv import read
from tests.loggers.test_json_lines import read as read_lines
from tests.loggers.test_tensorboard import points

KINDS: dict[str, Callable[[str], FolderLogger]] = {
    "csv": lambda folder: CSVLogger(folder, flush_logs_every_n_steps=1),
    "json": JSONLinesLogger,
    "tensorboard": TensorBoardLogger,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond so many bytes, as on a full disk; -1 for no limit."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it, so that `write` fails.
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def steps(logger: FolderLogger) -> list[Any]:
    """The steps of the rows on disk."""
    if isinstance(logger, TensorBoardLogger):
        return [step for step, _ in points(logger)["loss"]]
    if isinstance(logger, CSVLogger):
        return [int(row["step"]) for row in read(logger)]
    assert isinstance(logger, JSONLinesLogger)
    return [row["step"] for row in read_lines(logger)]


def log_rows(logger: FolderLogger, numbers: range) -> None:
    """Rows as of a run, with a checkpoint after them."""
    for step in numbers:
        logger.log_metrics({"epoch": 0, "loss": 0.1}, step)
    logger.state_dict()


@every_kind
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # TensorBoard's thread ends with the error
)
def test_rows_wait_for_a_disk_that_takes_none(
    kind: str,
    tmp_path: Path,
    limit: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = KINDS[kind](str(tmp_path))
    log_rows(logger, range(3))
    # In the middle of a row.
    limit(60)
    log_rows(logger, range(3, 20))
    limit(-1)
    log_rows(logger, range(20, 25))
    logger.finalize("success")
    assert steps(logger) == [*range(25)]
    (failing, again) = caplog.messages
    assert "cannot write its rows" in failing
    assert os.strerror(errno.EFBIG) in failing
    assert "can write again" in again


@every_kind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_goes_away_ends_nothing(kind: str, tmp_path: Path) -> None:
    logger = KINDS[kind](str(tmp_path))
    log_rows(logger, range(3))
    shutil.rmtree(logger.log_dir)
    log_rows(logger, range(3, 6))
    logger.finalize("success")
    assert steps(logger) == [3, 4, 5]


@every_kind
def test_a_relative_folder_when_the_program_goes_elsewhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    logger = KINDS[kind]("logs")
    log_rows(logger, range(3))
    root_dir = logger.state_dict()["root_dir"]
    monkeypatch.chdir("other")
    log_rows(logger, range(3, 6))
    logger.finalize("success")
    # So a resumed run finds it.
    assert logger.state_dict()["root_dir"] == root_dir
    assert steps(logger) == [*range(6)]
    assert not os.listdir()
