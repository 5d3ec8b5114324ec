"""examples/digits.py, as a user runs it: what it reaches, what it prints, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.browser import assert_page_is_whole, needs_browser
from tests.programs import run_program

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.py"


def run(*arguments: str, folder: Path | None = None) -> tuple[int, str]:
    """The example's exit status and standard output; in another folder than this one if one is named."""
    ended = run_program(EXAMPLE, *arguments, timeout=110, cwd=folder)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout


def printed(label: str, output: str) -> str:
    """What stands behind ``label`` at the beginning of a line."""
    found = re.search(rf"^ *{label} +(\S.*)$", output, re.MULTILINE)
    assert found is not None, f"{label!r} is not in the output:\n{output}"
    return found[1]


def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(folder: str) -> dict[str, int]:
    """How many points each curve in a folder of event files has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def test_a_short_run_leaves_curves_and_a_model_that_loads():
    status, output = run("--epochs", "3", "--seed", "1", "--dir", "out")

    accuracy = float(printed("Test accuracy", output))
    assert accuracy > 0.9
    assert status == (accuracy < 0.97)

    assert printed("to see them", output) == "tensorboard --logdir out/digits"
    folder = printed("Curves", output)
    points = curves(folder)
    assert (
        points["val_loss"] == points["val_acc"] == points["train_acc"] == 3
    )  # one an epoch
    assert points["train_loss"] == points["lr-AdamW"] == 6  # 60 steps, every 10th
    assert points["test_acc"] == 1
    hparams = json.loads((Path(folder) / "hparams.json").read_text())
    assert hparams == {
        "channels": 32,
        "learning_rate": 3e-3,
        "batch_size": 64,
        "num_workers": 0,
    }

    best = Path(printed("Best model", output))
    assert best.parent == (Path(folder) / "checkpoints").resolve()
    assert (best / "model" / "model.safetensors").is_file()
    assert (
        printed("to load it", output)
        == f"model = ConvNet.load_from_checkpoint({str(best)!r})"
    )
    assert measured(best) == pytest.approx(accuracy, abs=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit status, output and folder of the example as it is."""
    folder = tmp_path_factory.mktemp("whole")
    return *run("--seed", "7", folder=folder), folder


@pytest.mark.slow
def test_it_reaches_the_accuracy_that_it_promises(whole: tuple[int, str, Path]):
    status, output, _ = whole
    assert float(printed("Test accuracy", output)) >= 0.97
    assert status == 0
    assert Path(printed("Curves", output)) == Path("logs/digits/version_0")


@pytest.mark.slow
@needs_browser
def test_its_page_is_whole(whole: tuple[int, str, Path]):
    _, output, folder = whole
    assert_page_is_whole(folder / printed("Curves", output), shows="val_acc")


def measured(checkpoint: Path) -> float:
    """The test accuracy of a saved model, without a Trainer."""
    digits = example()
    model = digits.ConvNet.load_from_checkpoint(checkpoint).eval()
    data = digits.Digits()
    data.setup("test")
    with torch.no_grad():
        return (
            (model(data.test.images).argmax(1) == data.test.labels)
            .float()
            .mean()
            .item()
        )
