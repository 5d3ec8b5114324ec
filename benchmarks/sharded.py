"""What FSDP and ZeRO save of each process's memory under the Trainer, and what a step then costs.

Two processes on the CPU, with gloo; beside each of Loopwright's strategies stands a loop by hand on what it builds on:
torch's `fully_shard`, `deepspeed.initialize`. Each figure of memory is taken in fresh processes, the times as in `ddp`.

Memory is counted twice. *Tensors*: the storages of all tensors that live at the end of a backward pass, before the
step; as far as they are in memory, as ZeRO sets aside more for its messages than it uses here. *Peak*: the highest
resident size during a step, as Linux notes it (VmHWM), over that before the model was made.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from . import saving
from .contenders import settle
from .ddp import (
    BATCH,
    HEADER,
    STEPS,
    Runs,
    connect,
    launch,
    row,
    run_rounds,
    work,
)
from .report import Table, verdict

PROCESSES = 2
TARGET = 1.0  # of a step's time

WIDTH, LAYERS = 256, 4  # of the model whose steps are timed
MEASURED = (
    2  # the step in which memory is measured: by then, there are optimizer states
)
PARAMETERS = saving.BYTES // 3
LIMIT_MEMORY = 1.05  # over the library's own
LIMIT_PART, LIMIT_OTHERS = (
    0.55,
    0.05,
)  # of the whole checkpoint, that a process may hold twice while it saves
STRATEGIES = ("single", "ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3")
# ZeRO's: by default, each holds more than all of the model.
SIZES = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
BUCKETS: dict[str, Any] = dict.fromkeys(SIZES, 4_000_000)
GIVE_BACK = "MALLOC_MMAP_THRESHOLD_=65536"  # free memory goes back at once, and does not hide what is taken next
TIMED = ("fsdp", "deepspeed_stage_2")

# -- the loops ------------------------------------------------------------------------------------------------

Look = Callable[[int], None]


@dataclass
class Work:
    """What to run: one epoch of such a module."""

    strategy: str
    steps: type  # the user's code
    data: TensorDataset
    batch: int
    look: Look
    backward: Callable[[], None] | None = (
        None  # called at the end of each backward pass
    )
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's options


class Large(saving.Steps):
    """133 MB of parameters."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look(batch_idx)
        return super().training_step(batch[0], batch_idx)


class Small(Large):
    """One whose steps take some milliseconds."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        blocks = [(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*(part for block in blocks for part in block))


def by_hand(work: Work) -> None:
    """The loop that anybody would write."""
    steps: Any = work.steps
    module: Any = type("Plain", (steps, nn.Module), {"forward": steps.training_step})(
        work.look
    )
    loader = DataLoader(work.data, work.batch, sampler=DistributedSampler(work.data))
    if work.strategy == "fsdp":
        for part in module.layers:
            if isinstance(part, nn.Linear):
                fully_shard(part)
        fully_shard(module)
        optimizer = module.configure_optimizers()
        for batch_idx, batch in enumerate(loader):
            loss = module(batch, batch_idx)
            optimizer.zero_grad()
            loss.backward()
            if work.backward:
                work.backward()
            optimizer.step()
        return
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": work.batch, "steps_per_print": 10**9,
        "zero_optimization": {"stage": int(work.strategy[-1]), **work.zero},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=module.configure_optimizers(), config=config
    )
    for batch_idx, batch in enumerate(loader):
        loss = engine(batch, batch_idx)
        engine.backward(loss)
        if work.backward:
            work.backward()
        engine.step()
    engine.destroy()


def by_loopwright(work: Work) -> Any:
    from loopwright.framework import Module, Trainer
    from loopwright.strategies import DeepSpeedStrategy

    backward = work.backward
    hooks = {"on_after_backward": lambda self: backward()} if backward else {}
    module = type("Ours", (work.steps, Module), hooks)(work.look)
    strategy: Any = work.strategy
    if work.zero and "deepspeed" in strategy:
        strategy = DeepSpeedStrategy(
            int(strategy[-1]), config={"zero_optimization": work.zero}
        )
    devices = 1 if strategy == "single" else PROCESSES
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        barebones=True,
    )
    trainer.fit(module, DataLoader(work.data, work.batch))
    return trainer


# -- memory, in each process ----------------------------------------------------------------------------------


def tensors() -> Iterator[torch.Tensor]:
    """All tensors that Python knows of and their gradients; of distributed ones this process's part."""
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None:
                    yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_memory(storage: Any) -> int:
    """The bytes of a storage that have a page in memory."""
    page, libc = 4096, ctypes.CDLL(None)
    first = storage.data_ptr() // page * page
    seen = (
        ctypes.c_ubyte * (-(-(storage.data_ptr() + storage.nbytes() - first) // page))
    )()
    libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(seen) * page), seen)
    return min(page * sum(each & 1 for each in seen), storage.nbytes())


def live() -> int:
    """The bytes that live tensors take."""
    gc.collect()
    found = [
        tensor.untyped_storage() for tensor in tensors() if tensor.device.type == "cpu"
    ]
    return sum(
        in_memory(own)
        for own in {own.data_ptr(): own for own in found if own.nbytes()}.values()
    )


def resident(kind: str) -> int:
    """The resident size in bytes: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def forget_peak() -> int:
    """Let VmHWM begin anew; returns the resident size now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure_memory(strategy: str, who: str, folder: str) -> dict[str, int]:
    """Bytes of a training, and of a save by the Trainer after it, over those before."""
    settle()
    import_module("loopwright.framework")
    if strategy != "single":
        connect()
    found, at = {}, [0]
    before = forget_peak()

    def look(batch_idx: int) -> None:
        at[0] = batch_idx
        if batch_idx == MEASURED:
            forget_peak()
        elif batch_idx == MEASURED + 1:
            found["peak"] = resident("VmHWM") - before

    def backward() -> None:
        if at[0] == MEASURED + 1:  # as this takes memory, too
            found["tensors"] = live()

    run = by_hand if who == "raw" else by_loopwright
    data = TensorDataset(torch.randn(PROCESSES * (MEASURED + 2), 1440))
    trainer = run(Work(strategy, Large, data, 1, look, backward, BUCKETS))
    if trainer is None or strategy == "single":
        return found
    for kind, begin in {
        "waiting": trainer.save_checkpoint,
        "beside": trainer.checkpoints.save,
    }.items():
        before = forget_peak()
        save = begin(f"{folder}/{kind}.ckpt")
        if save is not None:
            save.finish()
        found[kind] = resident("VmHWM") - before
    return found


# -- time, in two processes -----------------------------------------------------------------------------------


def runs(strategy: str) -> Runs:
    def loop(run: Callable[[Work], Any]) -> Callable[..., None]:
        return lambda data, look, folder: run(Work(strategy, Small, data, BATCH, look))

    return {
        "raw": loop(by_hand),
        "loopwright": loop(by_loopwright),
        "raw again": loop(by_hand),
    }


def dataset(steps: int) -> TensorDataset:
    return TensorDataset(torch.randn(PROCESSES * BATCH * steps, WIDTH))


# -- in the parent --------------------------------------------------------------------------------------------


def start_memory(strategy: str, who: str) -> list[dict[str, int]]:
    """`measure_memory` of each process."""
    processes = 1 if strategy == "single" else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        launch(
            __name__,
            "0",
            folder,
            who,
            strategy,
            processes=processes,
            environment=[GIVE_BACK],
        )
        return [
            json.loads(Path(folder, f"{rank}.json").read_text())
            for rank in range(processes)
        ]


def strategies(among: Sequence[str]) -> list[str]:
    return [
        name
        for name in among
        if "deepspeed" not in name or find_spec("deepspeed") is not None
    ]


def title(strategy: str, who: str) -> str:
    if who == "loopwright":
        return f"Loopwright, `{strategy}`"
    return (
        "`fully_shard`"
        if strategy == "fsdp"
        else f"DeepSpeed {version('deepspeed')}, stage {strategy[-1]}"
    )


def compare_memory() -> Table:
    """Each process's memory; of the two, that of the one which takes more."""
    rows, figures = [], {}
    for strategy in strategies(STRATEGIES):
        library: dict[str, float] = {}
        for who in (
            ("raw", "loopwright")
            if strategy not in ("single", "ddp")
            else ("loopwright",)
        ):
            found = figures[f"{strategy}, {who}"] = start_memory(strategy, who)
            most = {
                key: max(each[key] for each in found) / PARAMETERS
                for key in ("tensors", "peak")
            }
            over = most["peak"] / library["peak"] if library else None
            judged = (
                ("", "", "")
                if over is None
                else (f"{over:.2f}", *verdict(over, LIMIT_MEMORY))
            )
            rows.append(
                [
                    title(strategy, who),
                    f"{most['tensors']:.2f}",
                    f"{most['peak']:.2f}",
                    *judged,
                ]
            )
            library = most
    header = ("", "tensors", "peak", "peak over the library's", "target", "")
    notes = [
        "133 MB of parameters; as much again of gradients, twice as much of AdamW's states."
    ]
    return Table(
        "Memory of each process, in copies of the parameters",
        header,
        rows,
        figures,
        notes,
    )


def compare_saving(memory: Table) -> Table:
    """What saving took, while the memory was measured."""
    rows = []
    for strategy in strategies(STRATEGIES[1:]):
        found, sharded = memory.figures[f"{strategy}, loopwright"], strategy != "ddp"
        waiting, beside = (
            [each[kind] / saving.BYTES for each in found]
            for kind in ("waiting", "beside")
        )
        rows.append([
            f"`{strategy}`", *(f"{part:.2f}" for part in beside),
            *verdict(max(beside), LIMIT_PART if sharded else None), f"{max(waiting):.2f}",
            *verdict(max(waiting), LIMIT_OTHERS),
        ])  # fmt: skip
    header = (
        "",
        "beside the training: rank 0",
        "rank 1",
        "target",
        "",
        "`save_checkpoint`",
        "target",
        "",
    )
    name = "Memory that a save of 400 MB takes in each process, in copies of the whole"
    return Table(name, header, rows, {}, ["The highest, over that before."])


def compare_time(rounds: int, quick: bool) -> Table:
    steps = STEPS // 5 if quick else STEPS
    rows, figures, notes = [], {}, []
    for strategy in strategies(TIMED):
        found = run_rounds(__name__, tuple(runs(strategy)), rounds, steps, strategy)
        by_hand = title(strategy, "raw")
        rows.append(row(by_hand, found, "raw", None))
        rows.append(row(f"{by_hand}, again", found, "raw again", None))
        rows.append(row(title(strategy, "loopwright"), found, "loopwright", TARGET))
        step = statistics.median(each["raw"]["step_s"] for each in found)
        notes.append(
            f"By hand, a step of `{strategy}` takes {step * 1e3:.1f} ms; medians over {len(found)} rounds."
        )
        figures[strategy] = found
    about = "A step of two processes (FSDP, ZeRO), as a ratio to that by hand"
    return Table(about, HEADER, rows, figures, [" ".join(notes)])


if __name__ == "__main__":
    steps, folder, name, strategy = sys.argv[1:]
    if "deepspeed" in strategy:
        import_module("deepspeed")  # later, it would hold the process group
    if steps == "0":
        outcome = measure_memory(strategy, name, folder)
        Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(
            json.dumps(outcome)
        )
    else:
        work(runs(strategy)[name], dataset, int(steps), folder)
    os._exit(
        0
    )  # DeepSpeed may hold the process group even so, and gloo's threads then abort at the end
