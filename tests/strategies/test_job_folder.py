"""What an agent that was killed leaves is removed by the next launch, and nothing else is."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from loopwright.strategies.launch.job_folder import job_folder, make_job_folder
from tests.framework.models import ended, in_a_child


def test_only_folders_of_ended_processes_of_ours_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/proc/self/ns/pid"):
        pytest.skip("here nobody tells which processes run")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def be_killed() -> None:
        Path(make_job_folder(), "call.pkl").write_text("what it has left")
        os.kill(os.getpid(), signal.SIGKILL)

    own = Path(make_job_folder())
    assert ended(in_a_child(be_killed)) == -signal.SIGKILL
    (left,) = {*os.listdir(tmp_path)} - {own.name}
    prefix, place, owner, number = left.split("_", 3)
    kept = {
        own.name,
        # Another machine's or container's, a user's, and one whose owner nobody knows.
        f"{prefix}_{place[::-1]}x_{owner}_{number}",
        f"{prefix}_{place}_notes_{number}",
        f"{prefix}_results",
    }
    for name in kept - {own.name}:
        (tmp_path / name).mkdir()
    if os.getuid() == 0:
        # Another user's, whose processes a system may hide.
        (tmp_path / f"{left}x").mkdir()
        os.chown(tmp_path / f"{left}x", 12345, -1)
        kept.add(f"{left}x")
    another = Path(make_job_folder())
    assert {*os.listdir(tmp_path)} == {*kept, another.name}


def test_the_folder_of_a_killed_agent_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def be_killed() -> None:
        with job_folder() as folder:
            Path(folder, "call.pkl").write_text("what it has left")
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(in_a_child(be_killed)) == -signal.SIGKILL
    until = time.monotonic() + 20
    while os.listdir(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert not os.listdir(tmp_path)
    with job_folder() as folder:
        assert os.listdir(tmp_path) == [Path(folder).name]
    assert not os.listdir(tmp_path)
