"""examples/custom_strategy.py, as a user runs it: a strategy that was written from the contract alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.programs import run_program

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_strategy.py"


@pytest.mark.parametrize(("devices", "steps"), [(1, 282), (2, 141)])
def test_processes_train_apart_and_average(devices: int, steps: int, tmp_path: Path):
    ended = run_program(EXAMPLE, "--devices", devices, timeout=110, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    # One in ten steps, and one at the end.
    averages = steps // 10 + 1
    assert f"averaged {averages} times in {steps} steps" in ended.stdout
    assert re.search(r"Replicas differ +False", ended.stdout)
    assert ended.stdout.count("Test accuracy") == 1
    assert not list(tmp_path.iterdir())


def test_it_uses_public_names_only():
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    ours = {n.module for n in imported if (n.module or "").startswith("loopwright")}
    assert ours == {"loopwright.framework", "loopwright.strategies"}
    private = [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and re.match("_[a-z]", n.attr)
    ]
    assert not private
