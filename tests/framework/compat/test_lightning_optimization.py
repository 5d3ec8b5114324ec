"""One program on Lightning and on Loopwright: accumulation by epochs, no optimizer, rows of validation, intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_program

PROGRAM = Path(__file__).parents[1] / "elsewhere" / "lightning_optimization.py"


def results_of(*command: Any) -> dict[str, Any]:
    ended = run_program(*command, timeout=200)
    assert ended.returncode == 0, ended.stderr
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.slow
def test_it_is_that_of_lightning(tmp_path: Path):
    theirs = results_of(PROGRAM, tmp_path / "theirs")
    ours = results_of("-m", "loopwright.lightning", PROGRAM, tmp_path / "ours")
    assert ours == theirs
