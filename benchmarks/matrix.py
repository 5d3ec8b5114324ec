"""What a step costs over that of the loop by hand that does the same: kinds of loaders × what is asked of the loop.

Both loops of a cell run in one process, in turns, on the same module and the same kind of loader. The module notes the
time at two of its steps. Beside the times stand the Python functions that a step calls more than by hand: they are the
same however busy the machine is.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from loopwright.callbacks import Callback
from loopwright.framework import CombinedLoader, Module, Trainer
from loopwright.loggers import JSONLinesLogger

from .report import Table, verdict

FIRST, COUNTED, TIMED = 120, 64, 512  # steps: before the clock starts, counted, timed
LOG_EVERY = 50
TARGETS = {"all defaults": 15.0}  # µs; 5 for all others
BATCH = 4


@dataclass
class Cell:
    """One run of one of the two loops."""

    folder: str
    steps: int
    tick: Callable[[int], None]  # called in each step with the batch's index


# -- loaders --------------------------------------------------------------------------------------------------


def samples(steps: int) -> TensorDataset:
    return TensorDataset(torch.randn(BATCH * steps, 32), torch.randn(BATCH * steps, 2))


def batches(steps: int) -> list[Any]:
    x, y = samples(steps).tensors
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


class Stream(IterableDataset[Any]):
    """The samples of a worker: every n-th."""

    def __init__(self, steps: int) -> None:
        self.samples = samples(steps)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.samples), step):
            yield self.samples[index]


class Unsized:
    """Any iterable that makes batches."""

    def __init__(self, steps: int) -> None:
        self.batches = batches(steps)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Sized(Unsized):
    def __len__(self) -> int:
        return len(self.batches)


def mapped(steps: int, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(samples(steps), BATCH, num_workers=workers)


def streamed(steps: int, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Stream(steps), BATCH, num_workers=workers)


def stateful(steps: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(samples(steps), BATCH)


class Zipped:
    """By hand, two loaders that are read together."""

    def __init__(self, *loaders: Any) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.loaders, strict=False)


# What each is for both, and where that differs, what it is for the loop by hand.
LOADERS: dict[str, Callable[[int], Any]] = {
    "list": batches,
    "DataLoader": mapped,
    "DataLoader, 2 workers": lambda steps: mapped(steps, 2),
    "IterableDataset": streamed,
    "IterableDataset, 2 workers": lambda steps: streamed(steps, 2),
    "iterable with a length": Sized,
    "iterable": Unsized,
    "StatefulDataLoader": stateful,
    "CombinedLoader": lambda steps: CombinedLoader([mapped(steps), mapped(steps)]),
}
BY_HAND = {"CombinedLoader": lambda steps: Zipped(mapped(steps), mapped(steps))}


# -- what is asked of the loop --------------------------------------------------------------------------------


class Steps:
    """The user's code, the same in both loops."""

    values = 0  # how many are logged in a step

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.tick = cell.tick

    def loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.tick(batch_idx)
        # Of loaders that are read together, the first one's.
        x, y = batch if isinstance(batch[0], torch.Tensor) else batch[0]
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)

    predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


class Plain(Steps, nn.Module):
    pass


class Ours(Steps, Module):
    pass


class Logging(Ours):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch, batch_idx)
        for number in range(self.values):
            self.log(f"value {number}", loss)
        return loss


class LoggingTen(Logging):
    values = 10


class LoggingOne(Logging):
    values = 1


class Scheduled(Ours):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Ours):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Validating(Ours):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch, batch_idx))


class Counting(Callback):
    """A user's callback on two hooks of each batch."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.begun += 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended += 1


def by_hand(
    module: Any,
    loader: Iterable[Any],
    *,
    window: int = 1,
    clip: float | None = None,
    scheduled: bool = False,
    mixed: bool = False,
    values: int = 0,
    callbacks: int = 0,
    folder: str = "",
) -> None:
    """The loop that anybody would write, and what was asked for in it."""
    optimizer = module.configure_optimizers()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100) if scheduled else None
    scaler = torch.amp.GradScaler("cpu") if mixed else None
    observers = [Counting() for _ in range(callbacks)]
    with open(Path(folder, "rows.jsonl"), "w", encoding="utf-8") as rows:
        for batch_idx, batch in enumerate(loader):
            for observer in observers:
                observer.on_train_batch_start(None, module, batch, batch_idx)
            with (
                torch.autocast("cpu", torch.float16)
                if mixed
                else contextlib.nullcontext()
            ):
                loss = module.training_step(batch, batch_idx)
            if batch_idx % window == 0:
                optimizer.zero_grad()
            scaled = loss if scaler is None else scaler.scale(loss)
            (scaled if window == 1 else scaled / window).backward()
            if (batch_idx + 1) % window == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                if scheduler is not None:
                    scheduler.step()
            if values:
                logged = {f"value {number}": loss.detach() for number in range(values)}
                if (batch_idx + 1) % LOG_EVERY == 0:
                    row = {name: value.item() for name, value in logged.items()}
                    rows.write(json.dumps(row) + "\n")
            for observer in observers:
                observer.on_train_batch_end(
                    None, module, loss.detach(), batch, batch_idx
                )


def bare_by_hand(module: Any, loader: Iterable[Any], **_: Any) -> None:
    optimizer = module.configure_optimizers()
    for batch_idx, batch in enumerate(loader):
        loss = module.training_step(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def manual_by_hand(module: Any, loader: Iterable[Any], **_: Any) -> None:
    optimizer = module.configure_optimizers()
    for batch_idx, batch in enumerate(loader):
        loss = module.loss(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def validate_by_hand(module: Any, loader: Iterable[Any], **_: Any) -> None:
    module.eval()
    total, count = torch.zeros(()), 0
    with torch.inference_mode():
        for batch_idx, batch in enumerate(loader):
            loss = module.validation_step(batch, batch_idx)
            total += loss * BATCH
            count += BATCH
    float(total / count)


def predict_by_hand(module: Any, loader: Iterable[Any], **_: Any) -> None:
    module.eval()
    outputs = []
    with torch.inference_mode():
        for batch_idx, batch in enumerate(loader):
            outputs.append(module.predict_step(batch, batch_idx).cpu())


@dataclass
class Way:
    """What is asked of the loop: of the Trainer, and by hand."""

    module: type[Ours] = Ours
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: Callable[..., None] = by_hand
    asked: dict[str, Any] = field(default_factory=dict)
    method: str = "fit"
    logs: bool = False
    callbacks: int = 0
    is_full: bool = False


WAYS = {
    "bare": Way(by_hand=bare_by_hand),
    "accumulation": Way(options={"accumulate_grad_batches": 4}, asked={"window": 4}),
    "clipping": Way(options={"gradient_clip_val": 1.0}, asked={"clip": 1.0}),
    "scheduler": Way(Scheduled, asked={"scheduled": True}),
    "16-mixed": Way(options={"precision": "16-mixed"}, asked={"mixed": True}),
    "one value": Way(LoggingOne, asked={"values": 1}, logs=True),
    "ten values": Way(LoggingTen, asked={"values": 10}, logs=True),
    "two callbacks": Way(asked={"callbacks": 2}, callbacks=2),
    "manual": Way(Manual, by_hand=manual_by_hand),
    "validation": Way(
        Validating, by_hand=validate_by_hand, method="validate", logs=True
    ),
    "prediction": Way(by_hand=predict_by_hand, method="predict"),
    "all defaults": Way(by_hand=bare_by_hand, is_full=True),
}


def run_by_hand(loader: str, way: Way, cell: Cell) -> None:
    made = BY_HAND.get(loader, LOADERS[loader])(cell.steps)
    way.by_hand(Plain(cell), made, folder=cell.folder, **way.asked)


def run_trainer(loader: str, way: Way, cell: Cell) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, **way.options}
    if way.method == "fit":
        options["max_epochs"] = 1
    if way.is_full:
        options["default_root_dir"] = cell.folder
    elif not way.logs:
        options["barebones"] = not way.callbacks
        if way.callbacks:
            options.update(quiet(), logger=False)
    else:
        options.update(quiet(), logger=JSONLinesLogger(cell.folder))
    if way.callbacks:
        options["callbacks"] = [Counting() for _ in range(way.callbacks)]
    trainer = Trainer(**options)
    getattr(trainer, way.method)(way.module(cell), LOADERS[loader](cell.steps))


def quiet() -> dict[str, Any]:
    """The Trainer's arguments that leave out what a loop by hand does not have."""
    off = ("checkpointing", "progress_bar", "model_summary", "record")
    known = inspect.signature(Trainer).parameters
    return {f"enable_{name}": False for name in off if f"enable_{name}" in known}


# -- times and counts -----------------------------------------------------------------------------------------

Loop = Callable[[str, Way, Cell], None]


def measure(loop: Loop, loader: str, way: Way, timed: int) -> tuple[float, float]:
    """µs of a step: that of which nine steps in ten take more, and the mean on the CPU.

    The former is of steps that nothing else has disturbed, be it another program or what is due now and then.
    """
    times: list[float] = []
    cpu: list[float] = []

    def tick(batch_idx: int) -> None:
        times.append(time.perf_counter())
        if batch_idx in (FIRST, FIRST + timed):
            cpu.append(time.process_time())

    run(loop, loader, way, timed, tick)
    steps = [end - start for start, end in pairwise(times[FIRST:])]
    undisturbed = statistics.quantiles(steps, n=10)[0] * 1e6
    return undisturbed, (cpu[1] - cpu[0]) / timed * 1e6


def count(loop: Loop, loader: str, way: Way) -> float:
    """How many Python functions a step calls."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    def tick(batch_idx: int) -> None:
        if batch_idx == FIRST:
            sys.setprofile(profile)
        elif batch_idx == FIRST + COUNTED:
            sys.setprofile(None)

    run(loop, loader, way, COUNTED, tick)
    return calls / COUNTED


def run(
    loop: Loop, loader: str, way: Way, timed: int, tick: Callable[[int], None]
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        gc.collect()
        loop(loader, way, Cell(folder, FIRST + timed + 4, tick))


def compare(only: str = "", rounds: int = 7, timed: int = TIMED) -> Table:
    """The cells whose names, as ``iterable × clipping``, contain the regular expression ``only``."""
    found: dict[str, dict[str, float]] = {}
    rows = []
    for loader, (name, way) in product(LOADERS, WAYS.items()):
        if not re.search(only, f"{loader} × {name}"):
            continue
        if loader == "StatefulDataLoader" and find_spec("torchdata") is None:
            continue
        pairs = []
        for turn in range(rounds):
            # They take turns in going first.
            order = [run_by_hand, run_trainer][:: 1 if turn % 2 else -1]
            times = {loop: measure(loop, loader, way, timed) for loop in order}
            pairs.append((times[run_by_hand], times[run_trainer]))
        more, cpu = (
            statistics.median(ours[which] - raw[which] for raw, ours in pairs)
            for which in (0, 1)
        )
        raw = statistics.median(raw[0] for raw, _ in pairs)
        calls = count(run_trainer, loader, way) - count(run_by_hand, loader, way)
        title = f"{loader} × {name}"
        found[title] = {"us": more, "cpu_us": cpu, "calls": calls, "raw_us": raw}
        target = TARGETS.get(name, 5.0)
        rows.append([
            title, f"{raw:.1f}", f"{more:.1f}", f"{cpu:.1f}", f"{calls:.0f}",
            *verdict(round(more, 1), target, " µs"),
        ])  # fmt: skip
        print(*rows[-1], file=sys.stderr, flush=True)
    return Table(
        "Time of a step over that of the same loop by hand, by loader and by what is asked of the loop",
        ("", "by hand, µs", "µs", "CPU µs", "calls", "target", ""),
        rows,
        found,
        [
            f"Medians over {rounds} pairs of runs in one process, of the time that nine steps in ten take more than; "
            "*CPU µs* are means over all steps. *Calls* are the Python functions that a step calls more than by hand."
        ],
    )
