from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from loopwright.callbacks import ModelCheckpoint, PyTorchProfiler, SimpleProfiler
from loopwright.loggers import CSVLogger
from tests.callbacks.scripted import Scripted, fit, loader, trainer


def test_sections_are_counted_and_add_up():
    profiler = SimpleProfiler()
    fit(ModelCheckpoint(every_n_train_steps=1), profiler)
    counts = profiler.counts
    assert (
        counts["data loading"],
        counts["forward"],
        counts["backward"],
        counts["optimizer step"],
    ) == (12, 12, 12, 12)
    assert counts["evaluation step"] == 3 * 2 + 2  # with the sanity check
    assert counts["end of evaluation"] == 4
    assert counts["checkpoint"] == 12
    assert all(seconds >= 0 for seconds in profiler.seconds.values())
    rows = [line.split() for line in profiler.table().splitlines()]
    assert float(rows[-1][1]) == pytest.approx(sum(profiler.seconds.values()), abs=1e-3)


def test_the_table_is_printed_and_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    profiler = SimpleProfiler()
    run = fit(profiler, logger=CSVLogger(tmp_path, "logs"))
    text = (tmp_path / "logs" / "version_0" / "profile-fit.txt").read_text()
    assert text.startswith("section")
    assert "data loading" in text
    assert text in capsys.readouterr().out
    run.test(Scripted(), loader(), verbose=False)
    test_text = (tmp_path / "logs" / "version_0" / "profile-test.txt").read_text()
    assert "evaluation step" in test_text
    assert "backward" not in test_text


def test_the_trainer_makes_one_by_name():
    run = trainer(profiler="simple")
    assert any(isinstance(callback, SimpleProfiler) for callback in run.callbacks)


def test_a_trace_of_the_asked_for_batches(capsys: pytest.CaptureFixture[str]):
    profiler = PyTorchProfiler(
        wait=1,
        warmup=1,
        active=2,
        repeat=2,
        activities=[ProfilerActivity.CPU],
        row_limit=5,
    )
    fit(profiler)
    assert [os.path.basename(path) for path in profiler.trace_paths] == [
        "trace-fit-rank0-0.json",
        "trace-fit-rank0-1.json",
    ]
    for path, steps in zip(profiler.trace_paths, ((2, 3), (6, 7)), strict=True):
        events = json.loads(Path(path).read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert {name for name in names if str(name).startswith("ProfilerStep#")} == {
            f"ProfilerStep#{s}" for s in steps
        }
        assert "aten::linear" in names
    running: Any = profiler.profiler
    assert running.step_num == 12  # of training; batches of validation are no steps
    printed = capsys.readouterr().out
    assert "Self CPU" in printed
    assert profiler.trace_paths[0] in printed


def test_a_handler_of_ones_own():
    taken: list[Any] = []
    profiler = PyTorchProfiler(
        wait=0, warmup=1, active=1, on_trace_ready=lambda p: taken.append(p.step_num)
    )
    fit(profiler)
    assert taken == [2]
    assert not any(name.endswith(".json") for name in os.listdir())


def test_a_run_that_is_too_short_says_so(capsys: pytest.CaptureFixture[str]):
    fit(PyTorchProfiler(wait=20))
    assert "traced nothing: it needs at least 22 batches" in capsys.readouterr().out


def test_evaluation_is_traced_too():
    profiler = PyTorchProfiler(wait=0, warmup=1, active=2)
    trainer(profiler).test(Scripted(), loader(), verbose=False)
    assert [os.path.basename(path) for path in profiler.trace_paths] == [
        "trace-test-rank0-0.json"
    ]


def test_an_exception_ends_the_trace():
    class Fails(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(PyTorchProfiler(wait=0, warmup=1, active=9), module=Fails())
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined] # torch exports it not
    fit(profiler := PyTorchProfiler(wait=0, warmup=1, active=1))
    assert len(profiler.trace_paths) == 1


@pytest.mark.parametrize(
    "arguments", [{"wait": -1}, {"warmup": 0.5}, {"active": 0}, {"repeat": None}]
)
def test_bad_counts_raise_at_construction(arguments: dict[str, Any]):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be an int of at least"):
        PyTorchProfiler(**arguments)
