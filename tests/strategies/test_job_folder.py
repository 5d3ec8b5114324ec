"""What the processes of a job leave goes with their agent."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from loopwright.strategies.launch.job_folder import job_folder
from tests.framework.models import ended, in_a_child


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
