"""examples/engine_loop.py: the loop of raw_loop.py, changed by four lines, computes the same wherever it runs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

from tests.programs import run_program

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RAW, ENGINE = (
    Path(EXAMPLES, name).read_text(encoding="utf-8")
    for name in ("raw_loop.py", "engine_loop.py")
)


def losses(program: str, folder: Path) -> list[float]:
    """What the program prints, from each epoch's last batch."""
    script = folder / "train.py"
    script.write_text(program, encoding="utf-8")
    ended = run_program(script, timeout=110, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return [float(found) for found in re.findall(r"loss (\S+)", ended.stdout)]


@pytest.fixture(scope="module", params=[1, 2])
def devices(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def raw_losses(devices: int, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of the raw loop with the batches of so many devices."""
    program = RAW.replace("batch_size=32", f"batch_size={32 * devices}")
    return losses(program, tmp_path_factory.mktemp("raw"))


def test_four_lines_change_and_an_import_is_added():
    changed = [
        line
        for line in difflib.ndiff(RAW.splitlines()[1:], ENGINE.splitlines()[1:])
        if line.startswith("+ ") and line[2:].strip()
    ]
    page = Path(EXAMPLES.parent, "docs", "engine.md").read_text(encoding="utf-8")
    assert all(f"+{line[2:]}\n" in page for line in changed)
    assert [re.sub(r"\(.*", "", line[2:].strip()) for line in changed] == [
        "from loopwright.framework import Engine",
        "engine = Engine",
        "model, optimizer, loader = engine.prepare",
        "engine.backward",
        "engine.print",
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_losses_are_those_of_the_raw_loop(
    devices: int, raw_losses: list[float], precision: str, tmp_path: Path
):
    strategy = "ddp" if devices > 1 else "single"
    arguments = f'accelerator="cpu", devices={devices}, strategy="{strategy}", precision="{precision}"'
    found = losses(ENGINE.replace("Engine()", f"Engine({arguments})"), tmp_path)
    if precision == "32-true":
        # An epoch's last batch is the same 5 images, in whichever process. Sums round otherwise in two halves, more so
        # with several threads, and five epochs of training magnify it.
        assert found == (
            raw_losses if devices == 1 else pytest.approx(raw_losses, rel=1e-2)
        )
    else:
        assert found == pytest.approx(raw_losses, rel=0.1)
