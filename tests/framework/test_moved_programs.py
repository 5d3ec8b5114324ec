"""Programs for Lightning and Accelerate run after `loopwright migrate --write`, and nothing else.

They are in `elsewhere/`, written with the calls of those projects' public examples; as they stand there, they run on
Lightning and Accelerate. Each ends with assertions of its own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from loopwright.framework.command_line.migrate.main import main
from tests.programs import run_program

PROGRAMS = Path(__file__).with_name("elsewhere")

# Runs programs one after the other, each as the main one.
RUNNER = """
import runpy
import sys

for program in {programs!r}:
    {between}
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
    sys.stdout.write(f"RAN {{program}}\\n")
    sys.stdout.flush()
"""


def moved(family: str, folder: Path, *options: str) -> list[str]:
    """Copy programs to a folder and rewrite them there; returns their names."""
    shutil.copytree(PROGRAMS / family, folder, dirs_exist_ok=True)
    assert main([str(folder), "--write", *options]) == 0
    names = sorted(file.name for file in folder.glob("*.py"))
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        assert not re.search(
            r"^\s*(from|import) (lightning|pytorch_lightning|accelerate)", text, re.M
        )
    return names


def run_all(names: list[str], folder: Path, processes: int, between: str = "") -> None:
    """Run programs in a folder, in one process or several."""
    runner = RUNNER.format(programs=names, between=between)
    (folder / "runner.py").write_text(runner)
    launch = ["-m", "loopwright", "launch", "--processes", str(processes)]
    command = launch if processes > 1 else []
    ended = run_program(*command, "runner.py", cwd=folder, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in names:
        assert ended.stdout.count(f"RAN {name}") == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "processes"), [("face", 1), ("face", 2), ("native", 1)]
)
def test_programs_for_lightning(target: str, processes: int, tmp_path: Path) -> None:
    names = moved("lightning", tmp_path, "--to", target)
    run_all(names, tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_programs_for_accelerate(processes: int, tmp_path: Path) -> None:
    names = moved("accelerate", tmp_path)
    # What processes share of Accelerate's state is one program's.
    between = (
        "from loopwright.accelerate.state import AcceleratorState\n"
        "    AcceleratorState._reset_state(True)"
    )
    run_all(names, tmp_path, processes, between)
