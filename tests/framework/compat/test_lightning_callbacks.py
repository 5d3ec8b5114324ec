"""One program on Lightning and on Loopwright: what callbacks of one name do is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_program

PROGRAM = Path(__file__).parents[1] / "elsewhere" / "lightning_callbacks.py"


def results_of(*command: Any) -> dict[str, Any]:
    ended = run_program(*command, timeout=200)
    assert ended.returncode == 0, ended.stderr
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.slow
def test_callbacks_do_what_those_of_lightning_do(tmp_path: Path):
    theirs = results_of(PROGRAM, tmp_path / "theirs")
    ours = results_of("-m", "loopwright.lightning", PROGRAM, tmp_path / "ours")
    # Beside Lightning's values, there are others.
    assert set(theirs.pop("names")) <= set(ours.pop("names"))
    assert ours == theirs
