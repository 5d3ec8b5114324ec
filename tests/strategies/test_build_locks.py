"""A build of DeepSpeed's operators that was killed does not hang the runs after it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from loopwright.strategies import DeepSpeedStrategy, build_locks
from loopwright.strategies.build_locks import await_builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made ten minutes ago."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    made = time.time() - 600
    os.utime(path, (made, made))
    return path


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("nothing to wait for")

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.usefixtures("never")
def test_a_lock_that_was_left_over_is_taken_away(lock: Path):
    await_builds()
    assert not lock.exists()


@pytest.mark.usefixtures("never")
def test_in_the_default_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(
        "torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path)
    )
    left = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    await_builds()
    assert not left.exists()


def test_the_lock_of_a_build_that_runs_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    waits = []
    with lock.open() as held:

        def sleep(seconds: float) -> None:
            waits.append(lock.exists())
            if len(waits) == 3:  # the build ends
                held.close()
                lock.unlink()

        monkeypatch.setattr(time, "sleep", sleep)
        with caplog.at_level("INFO", "loopwright"):
            await_builds()
    assert waits == [True] * 3
    assert caplog.text.count(str(lock)) == 1


def test_a_new_lock_may_be_another_machines(
    lock: Path, monkeypatch: pytest.MonkeyPatch
):
    os.utime(lock)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(lock.exists())
        made = time.time() - 600
        os.utime(lock, (made, made))
        if len(waits) == 1:  # its build goes on
            (lock.parent / "adam.o").touch()
        elif len(waits) == 2:
            made = time.time() - 400
            os.utime(lock.parent / "adam.o", (made, made))

    monkeypatch.setattr(time, "sleep", sleep)
    await_builds()
    assert waits == [True, True]
    assert not lock.exists()


@pytest.mark.usefixtures("never")
def test_another_process_takes_it_away_at_the_same_time(
    lock: Path, monkeypatch: pytest.MonkeyPatch
):
    def look(path: str) -> bool:
        lock.unlink()
        return False

    monkeypatch.setattr(build_locks, "_is_held", look)
    await_builds()


@pytest.mark.usefixtures("never")
def test_one_that_cannot_be_removed_ends_nothing(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def remove(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "remove", remove)
    await_builds()
    assert f"{lock} seems to be left over" in caplog.text


@pytest.mark.usefixtures("never")
def test_a_run_begins_with_it(lock: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (
        ("DS_ACCELERATOR", "cpu"),
        ("LOCAL_RANK", "0"),
    ):  # the strategy would set them for good
        monkeypatch.setenv(name, value)
    strategy = DeepSpeedStrategy(2)
    strategy.setup_environment([torch.device("cpu")], 1, None)
    strategy.connect()
    strategy.disconnect()
    assert not lock.exists()
