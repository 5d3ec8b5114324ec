from __future__ import annotations

import copy
import json
import os
import pstats
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from loopwright.callbacks import (
    AdvancedProfiler,
    ModelCheckpoint,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
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
    text = (tmp_path / "logs" / "version_0" / "fit-profile.txt").read_text()
    assert text.startswith("section")
    assert "data loading" in text
    assert text in capsys.readouterr().out
    run.test(Scripted(), loader(), verbose=False)
    test_text = (tmp_path / "logs" / "version_0" / "test-profile.txt").read_text()
    assert "evaluation step" in test_text
    assert "backward" not in test_text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("simple", SimpleProfiler),
        ("advanced", AdvancedProfiler),
        ("pytorch", PyTorchProfiler),
    ],
)
def test_the_trainer_makes_one_by_name(name: str, kind: type):
    run = trainer(profiler=name)
    assert isinstance(run.profiler, kind)
    assert run.profiler in run.callbacks


class MeasuresItself(Scripted):
    """Measures a section of its own in each training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        profiler: Any = self.trainer.profiler
        with profiler.profile("mine"):
            return super().training_step(batch, batch_idx)


class Irregular(Scripted):
    """Leaves a batch out, skips the rest of an epoch, and goes back once."""

    has_gone_back = False

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.skip_batches([1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.current_epoch == 2 and batch_idx == 3:
            return -1
        if self.current_epoch == 1 and batch_idx == 3 and not self.has_gone_back:
            self.has_gone_back = True
            self.trainer.rewind([(1, 2)])
        return None


@pytest.mark.parametrize("kind", [AdvancedProfiler, SimpleProfiler, PyTorchProfiler])
def test_runs_that_do_not_go_straight_are_measured(kind: type, tmp_path: Path):
    """One that is resumed inside an epoch, and one that comes to no end of batches and epochs."""
    path = tmp_path / "saved"
    saves = ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1)
    run = trainer(saves, profiler=kind(dirpath=tmp_path, filename="irregular"))
    run.fit(Irregular(), loader())
    assert run.global_step == 4 + 2 + 3
    profiler = kind(dirpath=tmp_path, filename="resumed")
    fit(profiler=profiler, ckpt_path=path / "epoch=0-step=2.ckpt")
    assert "fit-resumed.txt" in {file.name for file in tmp_path.iterdir()}


def test_results_go_to_the_folder_that_is_named(tmp_path: Path):
    folder = tmp_path / "new" / "profiles"
    for profiler in (
        SimpleProfiler(folder, "simple"),
        AdvancedProfiler(str(folder), "advanced", dump_stats=True),
        PyTorchProfiler(
            dirpath=folder, filename="torch", activities=[ProfilerActivity.CPU]
        ),
    ):
        trainer(profiler=profiler).fit(MeasuresItself(), loader())
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "fit-simple.txt",
        "fit-advanced.txt",
        "fit-advanced-mine.prof",
        "fit-advanced-run_training_epoch.prof",
        "fit-advanced-run_training_batch.prof",
        "fit-advanced-backward.prof",
        "fit-torch.txt",
        "trace-fit-rank0-0.json",
    }
    assert "mine" in (folder / "fit-simple.txt").read_text()
    assert "mine" in (folder / "trace-fit-rank0-0.json").read_text()
    assert "Self CPU" in (folder / "fit-torch.txt").read_text()
    stats = pstats.Stats(str(folder / "fit-advanced-mine.prof"))
    functions = {name for _, _, name in stats.stats}  # type: ignore[attr-defined] # as pstats documents it
    assert "training_step" in functions


def test_functions_count_for_the_innermost_section(capsys: pytest.CaptureFixture[str]):
    def outside() -> None: ...
    def inside() -> None: ...

    profiler = AdvancedProfiler(filename=None)
    with profiler.profile("outer"):
        outside()
        with profiler.profile("inner"):
            inside()
        outside()
    profiler.describe()
    outer, inner = capsys.readouterr().out.split("inner:\n")
    assert re.search(r"\n +2 .*\(outside\)", outer)
    assert "(inside)" not in outer
    assert re.search(r"\n +1 .*\(inside\)", inner)
    for wrong in (AdvancedProfiler(), SimpleProfiler(), PyTorchProfiler()):
        with pytest.raises(ValueError, match="was never started"):
            copy.deepcopy(wrong).stop("x")
    simple = SimpleProfiler()
    simple.start("x")
    with pytest.raises(ValueError, match="Attempted to start x"):
        simple.start("x")


def test_what_was_measured_before_an_exception_is_told(tmp_path: Path):
    class Fails(MeasuresItself):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return loss

    for profiler in (SimpleProfiler(tmp_path), AdvancedProfiler(tmp_path, "calls")):
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer(profiler=profiler).fit(Fails(), loader())
    assert "forward" in (tmp_path / "fit-profile.txt").read_text()
    assert "mine:" in (tmp_path / "fit-calls.txt").read_text()
    assert sys.getprofile() is None


def test_a_profiler_of_ones_own_is_told_the_sections():
    class Names(Profiler):
        def __init__(self) -> None:
            super().__init__()
            self.begun: list[str] = []
            self.ended: list[str] = []

        def start(self, action_name: str) -> None:
            self.begun.append(action_name)

        def stop(self, action_name: str) -> None:
            self.ended.append(action_name)

    names = Names()
    trainer(profiler=names, max_epochs=1).fit(MeasuresItself(), loader(), loader(2))
    assert sorted(names.begun) == sorted(names.ended)
    assert {name: names.begun.count(name) for name in {*names.begun}} == {
        "run_training_epoch": 1,
        "run_training_batch": 4,
        "mine": 4,
        "backward": 4,
        "validate_step": 2,
        "sanity_check_step": 2,
    }


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
