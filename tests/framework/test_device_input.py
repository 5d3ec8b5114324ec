"""Batches come to a CUDA device from pinned memory, on a stream of their own, ahead of their use.

Without such a device, streams that only note what is asked of them show the order; tests marked `gpu` need one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Module, Trainer
from loopwright.framework.data import device_input
from loopwright.framework.data.combined import CombinedLoader, may_read_ahead
from loopwright.framework.data.device_input import CopiedAhead, Copies, copied_ahead

CPU = torch.device("cpu")


class Streams:
    """In the place of `torch.cuda`: two streams, and notes of what they are asked for."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.current = "computing"

    def Stream(self, device: Any) -> Any:  # noqa: N802 (torch's name)
        return self.named("copying")

    def current_stream(self, device: Any) -> Any:
        return self.named(self.current)

    def named(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            record_event=lambda: self.notes.append(f"event on {name}"),
            wait_event=lambda event: self.notes.append(f"{name} waits"),
        )

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Noted(Tensor):
    """A tensor that notes how it is moved."""

    streams: Streams
    pinned = False
    is_copy = False

    def is_pinned(self, *_: Any) -> bool:
        return self.pinned

    def pin_memory(self, *_: Any) -> Tensor:
        self.streams.notes.append(f"pin {int(self)}")
        return noted(int(self), self.streams, pinned=True)

    def to(self, *_: Any, non_blocking: bool = False) -> Any:
        how = "" if non_blocking else " and wait"
        self.streams.notes.append(f"copy {int(self)}, {self.streams.current}{how}")
        copied = noted(int(self), self.streams)
        copied.is_copy = True
        return copied

    def record_stream(self, stream: Any) -> None:
        self.streams.notes.append(f"{stream.name} keeps {int(self)}")


def noted(value: int, streams: Streams, pinned: bool = False) -> Noted:
    tensor = torch.tensor(value).as_subclass(Noted)
    tensor.streams = streams
    tensor.pinned = pinned
    return tensor


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    copies = Copies(CPU, streams)
    monkeypatch.setattr(device_input, "copies_to", lambda device: copies)
    return streams


class Source:
    """Batches 0, 1, …, each with its weight; notes when one is read, and raises where it is told to."""

    def __init__(
        self, streams: Streams, length: int, fails_at: int | None = None
    ) -> None:
        self.streams, self.length, self.fails_at = streams, length, fails_at
        self.batch_weight = -1.0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            self.streams.notes.append(f"read {number}")
            if number == self.fails_at:
                raise OSError(f"batch {number} is gone")
            self.batch_weight = float(number)
            yield noted(number, self.streams)


def test_two_batches_are_copied_ahead_and_waited_for_where_they_are_used(
    streams: Streams,
):
    source = Source(streams, 4)
    ahead = CopiedAhead(iter(source), source, Copies(CPU, streams))
    begun = [
        [f"read {n}", f"pin {n}", f"copy {n}, copying", "event on copying"]
        for n in range(4)
    ]
    used = [["computing waits", f"computing keeps {n}"] for n in range(4)]
    expected = [
        *[*begun[0], *begun[1], *begun[2], *used[0], "use 0, 0.0"],
        *[*begun[3], *used[1], "use 1, 1.0"],
        *[*used[2], "use 2, 2.0"],
        *[*used[3], "use 3, 3.0"],
    ]

    for batch in ahead:
        assert batch.is_copy
        streams.notes.append(f"use {int(batch)}, {ahead.batch_weight}")

    assert streams.notes == expected


def test_an_error_of_the_loader_is_raised_at_its_batch(streams: Streams):
    source = Source(streams, 5, fails_at=3)
    ahead = CopiedAhead(iter(source), source, Copies(CPU, streams))
    assert [int(next(ahead)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="batch 3 is gone"):
        next(ahead)
    assert list(ahead) == []


class MovesItself:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def to(self, device: Any) -> str:
        self.streams.notes.append(f"moves itself, {self.streams.current}")
        return "moved"


def test_pinned_memory_is_not_pinned_twice_and_any_structure_is_copied(
    streams: Streams,
):
    batch = {
        "x": [noted(1, streams, pinned=True), (noted(2, streams), "text")],
        "graph": MovesItself(streams),
    }
    moved = device_input.move_batch(batch, CPU)

    assert moved["x"][0].is_copy
    assert moved["x"][1][0].is_copy
    assert moved["x"][1][1] == "text"
    assert moved["graph"] == "moved"
    assert "pin 1" not in streams.notes
    assert streams.notes == [
        *["copy 1, copying", "pin 2", "copy 2, copying", "moves itself, computing"],
        *[
            "event on copying",
            "computing waits",
            "computing keeps 1",
            "computing keeps 2",
        ],
    ]


class Reading(Module):
    """Notes which batches it trains on."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.streams = streams

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.streams.notes.append(f"train {int(batch)}")
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooked(Reading):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.streams.notes.append(f"before {int(batch)}")
        return batch


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def trained(streams: Streams) -> list[int]:
    return [int(note.split()[1]) for note in streams.notes if note.startswith("train")]


def test_a_run_goes_on_after_what_it_has_used_not_what_it_has_copied(
    streams: Streams, tmp_path: Path
):
    batches = [noted(number, streams) for number in range(6)]
    first = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    first.fit(Reading(streams), batches)
    first.save_checkpoint(tmp_path / "a.ckpt")
    # It was ahead of its use.
    assert streams.notes.index("copy 3, copying") < streams.notes.index("train 1")
    assert trained(streams) == [0, 1]

    streams.notes.clear()
    again = trainer(tmp_path, enable_checkpointing=False)
    again.fit(Reading(streams), batches, ckpt_path=tmp_path / "a.ckpt")
    assert trained(streams) == [2, 3, 4, 5]


def test_a_hook_of_the_users_is_called_as_its_batch_is_used(
    streams: Streams, tmp_path: Path
):
    batches = [noted(number, streams) for number in range(3)]
    trainer(tmp_path, enable_checkpointing=False).fit(Hooked(streams), batches)
    order = [
        note for note in streams.notes if note.startswith(("before", "copy", "train"))
    ]
    assert order == [
        note
        for number in range(3)
        for note in (f"before {number}", f"copy {number}, copying", f"train {number}")
    ]


def test_what_this_process_makes_is_not_read_ahead():
    dataset = TensorDataset(torch.ones(4))
    here, in_workers = DataLoader(dataset), DataLoader(dataset, num_workers=1)
    assert may_read_ahead(in_workers)
    assert may_read_ahead([1, 2])
    assert may_read_ahead(CombinedLoader([in_workers, [1]]))
    # It draws at random as the model does, or looks at the model.
    assert not may_read_ahead(here)
    assert not may_read_ahead(iter([1]))
    assert not may_read_ahead(CombinedLoader([in_workers, here]))


def test_on_the_cpu_nothing_is_between_the_loader_and_the_step():
    batches = iter([torch.ones(1)])
    assert copied_ahead(batches, [torch.ones(1)], None, CPU) is batches


class Deep(Module):
    """Steps that keep a GPU busy for some milliseconds each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2048, 2048)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"]
        for _ in range(20):
            x = self.layer(x).relu()
        return x.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def on_gpu(**options: Any) -> Trainer:
    return Trainer(
        accelerator="gpu", devices=1, max_epochs=1, barebones=True, **options
    )


@pytest.mark.gpu
def test_copies_run_beside_the_steps_kernels():
    batches = [{"x": torch.randn(4096, 2048)} for _ in range(12)]
    activities = [
        torch.profiler.ProfilerActivity.CUDA,
        torch.profiler.ProfilerActivity.CPU,
    ]
    with torch.profiler.profile(activities=activities) as profile:
        on_gpu().fit(Deep(), batches)

    events = [
        event for event in profile.events() or () if event.device_type.name == "CUDA"
    ]
    copies = [event for event in events if "Memcpy HtoD" in event.name]
    kernels = [event for event in events if "Mem" not in event.name]
    beside = sum(
        any(
            kernel.time_range.start < copy.time_range.end
            and copy.time_range.start < kernel.time_range.end
            for kernel in kernels
        )
        for copy in copies
    )
    assert all("Pinned" in copy.name for copy in copies[-8:])
    # The first three come before there is anything to compute.
    assert beside >= 6


class Watched(Deep):
    """Makes each wait of the host for the device an error, once a few steps have been taken."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 5:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == 25:
            torch.cuda.set_sync_debug_mode("default")
        return super().training_step(batch, batch_idx)


@pytest.mark.gpu
@pytest.mark.parametrize("in_workers", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 1.0},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
    ],
    ids=["bare", "clipping", "accumulation", "bf16-mixed"],
)
def test_the_host_never_waits_for_the_device(options: dict[str, Any], in_workers: bool):
    samples: Any = [{"x": torch.randn(2048)} for _ in range(64)]
    loader: Any = DataLoader(samples, 2, num_workers=int(in_workers))
    try:
        on_gpu(**options).fit(Watched(), loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
