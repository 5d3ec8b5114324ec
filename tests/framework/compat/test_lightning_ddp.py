"""One program on Lightning and on Loopwright in two processes: what callbacks of one name do is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_program

PROGRAM = Path(__file__).parents[1] / "elsewhere" / "lightning_ddp.py"


def results_of(folder: Path, *command: Any) -> dict[str, Any]:
    folder.mkdir()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    ended = run_program(*launcher, *command, folder, timeout=250)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "found.json").read_text())


def assert_close(name: str, ours: Any, theirs: Any) -> None:
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for own, their in zip(ours, theirs, strict=True):
            assert_close(name, own, their)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
    else:
        assert ours == theirs, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_do_what_those_of_lightning_do(tmp_path: Path):
    pytest.importorskip("lightning.pytorch")
    theirs = results_of(tmp_path / "theirs", PROGRAM)
    ours = results_of(tmp_path / "ours", "-m", "loopwright.lightning", PROGRAM)
    assert ours.keys() == theirs.keys()
    assert theirs["device"]
    # Lightning's processes end with different weights where a part was frozen at first; ours end with the same.
    assert theirs.pop("finetuning differ") is True
    assert ours["finetuning differ"] is False
    del theirs["finetuning"]
    for name, their in theirs.items():
        assert_close(name, ours[name], their)
