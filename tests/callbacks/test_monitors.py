"""Callbacks that measure a run: they change nothing of it, and tell the truth."""

from __future__ import annotations

import csv
import gc
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from loopwright.callbacks import (
    AdvancedProfiler,
    Callback,
    DeviceStatsMonitor,
    GarbageCollection,
    MemorySnapshot,
    ModelCheckpoint,
    ThroughputMonitor,
    TQDMProgressBar,
)
from loopwright.callbacks.peak_flops import peak_of
from loopwright.framework import Module
from loopwright.loggers import CSVLogger
from tests.callbacks.scripted import Scripted, fit, loader, trainer
from tests.strategies.distributed import in_processes


def rows_of(logger: CSVLogger) -> list[dict[str, float]]:
    """The rows of a CSV logger, without what a row has no value for."""
    assert logger.log_dir is not None
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def steps_with(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row["step"] for row in rows if name in row]


class Collections(Callback):
    """Notes at which steps Python collects garbage while it trains, and whether it may by itself."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.automatic: set[bool] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        gc.callbacks.append(self.note)
        self.trainer = trainer

    def note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and self.trainer.training:
            self.steps.append(self.trainer.global_step)

    def on_train_batch_start(self, *_: Any) -> None:
        self.automatic.add(gc.isenabled())

    def on_train_end(self, *_: Any) -> None:
        gc.callbacks.remove(self.note)


def test_garbage_is_collected_at_certain_steps_only():
    seen = Collections()
    fit(GarbageCollection(every_n_train_steps=5), seen, validate=False)
    assert seen.steps == [5, 10]
    assert seen.automatic == {False}
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match=r"generation must be 0 or 1 or 2; got 3"):
        GarbageCollection(generation=3)


def test_python_collects_again_after_an_exception():
    class Fails(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(GarbageCollection(), module=Fails())
    assert gc.isenabled()


def test_the_cpus_values_stand_beside_those_of_the_step(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    run = fit(DeviceStatsMonitor(), logger=logger, log_every_n_steps=4)
    rows = rows_of(logger)
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        for name in ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent"):
            assert steps_with(rows, f"DeviceStatsMonitor.{hook}/{name}") == [4, 8, 12]
    memory = [
        row["DeviceStatsMonitor.on_validation_batch_end/cpu_vm_percent"]
        for row in rows
        if "DeviceStatsMonitor.on_validation_batch_end/cpu_vm_percent" in row
    ]
    assert len(memory) == 3
    assert all(0 < value <= 100 for value in memory)
    run.test(Scripted(), loader(), verbose=False)
    assert any("on_test_batch_start" in name for row in rows_of(logger) for name in row)


def test_device_stats_need_a_logger_and_psutil(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with pytest.raises(RuntimeError, match="Cannot use `DeviceStatsMonitor`"):
        fit(DeviceStatsMonitor())
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"loopwright\[monitors\]"):
        fit(DeviceStatsMonitor(), logger=CSVLogger(tmp_path))
    logger = CSVLogger(tmp_path)
    fit(DeviceStatsMonitor(cpu_stats=False), logger=logger)
    assert not any("Device" in name for row in rows_of(logger) for name in row)


@pytest.mark.gpu
def test_the_allocators_numbers_are_logged(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    fit(DeviceStatsMonitor(), logger=logger, accelerator="gpu", devices=1)
    name = "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.current"
    assert steps_with(rows_of(logger), name) == list(range(1, 13))


def test_throughput_is_that_of_the_last_batches(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    monitor = ThroughputMonitor(length_fn=lambda batch: 6, window_size=4)
    fit(monitor, logger=logger, max_epochs=1)
    rows = rows_of(logger)
    assert [row["train/batches"] for row in rows if "train/batches" in row] == [1, 2, 3, 4]  # fmt: skip
    last = next(row for row in rows if row.get("train/batches") == 4)
    assert last["train/samples"] == 8
    assert last["train/lengths"] == 24
    # Only now there are as many batches as a window has.
    assert steps_with(rows, "train/device/batches_per_sec") == [4]
    rate = last["train/device/batches_per_sec"]
    assert last["train/device/samples_per_sec"] == pytest.approx(2 * rate)
    assert last["train/device/items_per_sec"] == pytest.approx(6 * rate)
    assert last["train/steps_per_sec"] == pytest.approx(rate)
    # A linear layer of 2 inputs: the products of the forward pass, and of the gradient of its weight.
    assert last["train/device/flops_per_sec"] == pytest.approx(16 * rate)
    assert "train/batches_per_sec" not in last
    assert "train/device/mfu" not in last
    validated = next(row for row in rows if "validate/batches" in row)
    assert validated["validate/batches"] == 2


class Clock(Callback):
    """A clock by which a batch of training takes a second, and one of validation a hundred."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        self.now += 100


def test_validation_takes_no_time_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock()
    monkeypatch.setattr("loopwright.callbacks.throughput_monitor.perf_counter", clock)
    logger = CSVLogger(tmp_path)
    fit(clock, ThroughputMonitor(window_size=2), logger=logger)
    rows = rows_of(logger)
    times = [row["train/time"] for row in rows if "train/time" in row]
    assert times == list(range(1, 13))
    rates = {row["train/steps_per_sec"] for row in rows if "train/steps_per_sec" in row}
    assert rates == {1}
    times = [row["validate/time"] for row in rows if "validate/time" in row]
    assert times == [200] * 3


def test_a_module_may_tell_its_operations(tmp_path: Path):
    class Tells(Scripted):
        flops_per_batch = 100

    logger = CSVLogger(tmp_path)
    fit(ThroughputMonitor(window_size=2), logger=logger, module=Tells(), max_epochs=1)
    last = [row for row in rows_of(logger) if "train/device/flops_per_sec" in row][-1]
    rate = last["train/device/batches_per_sec"]
    assert last["train/device/flops_per_sec"] == pytest.approx(100 * rate)


class Tokens(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.embedding(batch["input_ids"]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_tokens_are_found_and_windows_of_accumulation_count_once(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    data: Any = [{"input_ids": torch.zeros(2, 5, dtype=torch.long)} for _ in range(8)]
    trainer(
        ThroughputMonitor(window_size=2),
        logger=logger,
        max_epochs=1,
        accumulate_grad_batches=2,
    ).fit(Tokens(), DataLoader(data, batch_size=None))
    rows = [row for row in rows_of(logger) if "train/batches" in row]
    assert [row["train/batches"] for row in rows] == [2, 4, 6, 8]
    last = rows[-1]
    rate = last["train/device/batches_per_sec"]
    assert last["train/device/tokens_per_sec"] == pytest.approx(10 * rate)
    assert last["train/steps_per_sec"] == pytest.approx(rate / 2)


def test_a_batch_without_a_size_asks_for_a_function(tmp_path: Path):
    class Sizeless(Tokens):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.embedding.weight.square().mean()

    fitted = trainer(ThroughputMonitor(), logger=CSVLogger(tmp_path), max_epochs=1)
    with pytest.raises(ValueError, match="pass batch_size_fn="):
        fitted.fit(Sizeless(), ["a", "b"])


class Block(nn.Linear):
    """A layer that dynamo compiles, unlike those of torch.nn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_a_compiled_model_stays_compiled(tmp_path: Path):
    class Deep(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(super().forward(x))

    ran = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(fitted.batch_idx)
            return graph.forward(*args)

        return run

    fitted = trainer(
        ThroughputMonitor(),
        logger=CSVLogger(tmp_path),
        max_epochs=1,
        compile={"backend": backend},
    )
    fitted.fit(Deep(), loader())
    assert {*ran} == {1, 2, 3}  # in the first batch operations were counted


def test_a_resumed_run_does_not_count_operations_again(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    settings: dict[str, Any] = {"logger": CSVLogger(tmp_path), "validate": False}
    fit(ThroughputMonitor(), saves, max_steps=3, **settings)
    monitor = ThroughputMonitor(window_size=2)
    monitor.measure_flops = False
    logger = settings["logger"] = CSVLogger(tmp_path / "resumed")
    fit(monitor, ckpt_path=saves.best_model_path, max_epochs=2, **settings)
    assert steps_with(rows_of(logger), "train/device/flops_per_sec")


def test_counting_operations_changes_no_weight(tmp_path: Path):
    weights = []
    for callbacks in ([], [ThroughputMonitor(), DeviceStatsMonitor(), GarbageCollection()]):  # fmt: skip
        torch.manual_seed(0)
        module = Scripted()
        fit(*callbacks, module=module, logger=CSVLogger(tmp_path))
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.float16, 362e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16, None),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
        ("some new chip", torch.bfloat16, None),
    ],
)
def test_peaks_of_devices(name: str, dtype: torch.dtype, peak: float | None):
    assert peak_of(name, dtype) == peak


def test_peaks_of_32_bit_floats_go_by_what_torch_may_round():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
        assert peak_of("Tesla V100-SXM2-16GB", torch.float32) == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_of_a_cpu_is_not_recorded_which_a_line_says(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    class Fails(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise torch.OutOfMemoryError("out of memory")

    snapshot = MemorySnapshot(tmp_path)
    with (
        caplog.at_level(logging.INFO, "loopwright"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        fit(snapshot, module=Fails())
    assert "CUDA devices only; on cpu nothing is recorded" in caplog.text
    assert snapshot.path == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_snapshot_tells_what_has_asked_for_memory(tmp_path: Path):
    class Greedy(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.kept = torch.empty(2**20, device=self.device)
            return torch.empty(2**50, device=self.device)

    snapshot = MemorySnapshot(tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        fit(snapshot, module=Greedy(), accelerator="gpu", devices=1, validate=False)
    assert snapshot.path == str(tmp_path / "memory-fit-rank0.pickle")
    written = pickle.loads(Path(snapshot.path).read_bytes())
    frames = {
        frame["name"]
        for events in written["device_traces"]
        for event in events
        for frame in event.get("frames", ())
    }
    assert "training_step" in frames


def scenes(folder: Path) -> None:
    """Run all monitors in two processes."""
    logger = CSVLogger(folder)
    callbacks = [
        ThroughputMonitor(window_size=2),
        DeviceStatsMonitor(),
        GarbageCollection(every_n_train_steps=1),
        TQDMProgressBar(),
    ]
    profiler = AdvancedProfiler(folder / "profiles", "calls", line_count_restriction=5)
    fit(*callbacks, logger=logger, profiler=profiler, devices=2, strategy="ddp")


@pytest.mark.slow
def test_several_processes_are_measured_together(tmp_path: Path):
    in_processes(2, scenes, tmp_path)
    (metrics,) = tmp_path.glob("*/*/metrics.csv")
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/samples_per_sec"]]
    assert [row["step"] for row in rows] == [*map(str, range(2, 7))]
    for row in rows:
        one = float(row["train/device/samples_per_sec"])
        assert float(row["train/samples_per_sec"]) == pytest.approx(2 * one)
    names = {path.name for path in (tmp_path / "profiles").iterdir()}
    assert names == {"fit-calls-0.txt", "fit-calls-1.txt"}
