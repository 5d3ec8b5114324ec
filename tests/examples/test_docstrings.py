"""examples/docstrings.py, as a user runs it: what it reaches, what it prints, what it leaves behind, and its data."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.browser import assert_page_is_whole, needs_browser
from tests.examples.test_digits import curves, printed
from tests.programs import run_program

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "docstrings.py"


def run(
    *arguments: str, timeout: float = 110, folder: Path | None = None
) -> tuple[int, str]:
    """The example's exit status and standard output; in another folder than this one if one is named."""
    ended = run_program(EXAMPLE, *arguments, timeout=timeout, cwd=folder)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("docstrings", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_short_run_leaves_curves_and_a_model_that_loads(example: Any):
    """In one process."""
    shortened = "--limit 1000 --epochs 2 --seed 1 --dir out --devices 1"
    status, output = run(*shortened.split())
    assert printed("Docstrings", output) == "1000: 850 to train on, 150 to validate"
    accuracy = assert_complete(output, example, "out", epochs=2, devices=1)
    assert status == (accuracy < 0.65)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit status, output and folder of the example as it is, in two processes."""
    folder = tmp_path_factory.mktemp("whole")
    return *run("--seed", "7", timeout=180, folder=folder), folder


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_it_reaches_the_accuracy_that_it_promises_in_the_time_that_it_promises(
    example: Any, whole: tuple[int, str, Path], monkeypatch: pytest.MonkeyPatch
):
    status, output, folder = whole
    monkeypatch.chdir(folder)
    assert assert_complete(output, example, "logs", epochs=5, devices=2) >= 0.65
    assert status == 0
    assert Path(printed("Curves", output)) == Path("logs/docstrings/version_0")


@pytest.mark.slow
@needs_browser
def test_its_page_is_whole(whole: tuple[int, str, Path]):
    _, output, folder = whole
    assert_page_is_whole(folder / printed("Curves", output), shows="val_acc")


def assert_complete(
    output: str, example: Any, root: str, epochs: int, devices: int
) -> float:
    """What a run prints is true, and all is there; returns the accuracy."""
    # Printed once, whatever the number of processes.
    assert output.count("Val. accuracy") == output.count("Best model") == 1
    data = example.Docstrings(f"{root}/docstrings")
    data.setup("validate")
    train, val = len(data.train), len(data.val)
    assert (
        printed("Docstrings", output)
        == f"{train + val}: {train} to train on, {val} to validate"
    )

    assert printed("to see them", output) == f"tensorboard --logdir {root}/docstrings"
    folder = printed("Curves", output)
    assert [path.name for path in Path(root, "docstrings").glob("version_*")] == [
        Path(folder).name
    ]
    points = curves(folder)
    assert points["train_acc"] == epochs  # one an epoch
    assert (
        points["val_loss"] == points["val_acc"] == epochs + 1
    )  # and one of the best model
    steps = epochs * -(-train // 32)  # of 32 docstrings in all; every 20th is logged
    assert points["train_loss"] == points["lr-AdamW"] == steps // 20
    hparams = json.loads((Path(folder) / "hparams.json").read_text())
    assert hparams["batch_size"] == 32 // devices

    best = Path(printed("Best model", output))
    assert best.parent == (Path(folder) / "checkpoints").resolve()
    assert re.search(
        rf"Classifier\.load_from_checkpoint\({str(best)!r}\)",
        printed("to load it", output),
    )
    model = example.Classifier.load_from_checkpoint(best).eval()
    assert f"{measured(model, example, data):.4f}" == printed("Val. accuracy", output)
    assert set(model.classify(["Send a request to the server.", "Draw."])) <= set(
        example.NAMES
    )
    return float(printed("Val. accuracy", output))


def measured(model: Any, example: Any, data: Any) -> float:
    """The validation accuracy of a loaded model on the run's data, without a Trainer."""
    texts, labels = zip(*data.val, strict=True)
    predicted = model.classify(list(texts))
    return sum(
        name == example.NAMES[label]
        for name, label in zip(predicted, labels, strict=True)
    ) / len(labels)


@pytest.fixture(scope="module")
def found(example: Any) -> list[tuple[str, int]]:
    """What there is to learn from in this Python's library."""
    return example.collect()


def test_every_topic_has_docstrings_and_none_outweighs_the_others(
    example: Any, found: list[tuple[str, int]]
):
    assert len(found) > 3000
    counts = Counter(label for _, label in found)
    assert sorted(counts) == list(range(len(example.NAMES)))
    assert min(counts.values()) >= 30
    assert max(counts.values()) / len(found) <= 0.44


def test_each_docstring_is_there_once(found: list[tuple[str, int]]):
    texts = [text for text, _ in found]
    assert len(set(texts)) == len(texts)
    assert all(text == " ".join(text.lower().split()) for text in texts)


def test_no_module_stands_under_two_topics(example: Any):
    modules = " ".join(example.TOPICS.values()).split()
    assert len(set(modules)) == len(modules)


def test_source_files_are_parsed_and_not_run(example: Any, tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""What  the\n  Module does."""\n'
        "raise SystemExit\n"
        "class A:\n"
        "    'Too short.'\n"
        "    async def f(self):\n"
        "        'Wait for it.'\n"
    )
    assert sorted(example.docstrings(file)) == ["wait for it.", "what the module does."]


def test_the_split_is_always_the_same_and_shares_nothing(example: Any):
    for seed, folder in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        example.Docstrings(folder, limit=1000).prepare_data()
    for name in ("docstrings.json", "tokenizer.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()

    data = example.Docstrings("a")
    data.setup("fit")
    train, val = ({text for text, _ in part} for part in (data.train, data.val))
    assert (len(train), len(val)) == (850, 150)
    assert not train & val


def test_a_batch_is_padded_cut_and_masked(example: Any, found: list[tuple[str, int]]):
    tokenizer = example.train_tokenizer([text for text, _ in found[:500]])
    batch = example.encode(tokenizer, ["wait", "wait " * 100, "wait for it"])
    assert (
        batch["input_ids"].shape == batch["attention_mask"].shape == (3, example.LENGTH)
    )
    assert batch["attention_mask"].sum(1).tolist() == [
        3,
        example.LENGTH,
        5,
    ]  # the first and last tokens are special
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
