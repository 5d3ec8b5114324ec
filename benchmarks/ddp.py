"""What a step of two processes costs in the Trainer, as a ratio to a loop by hand on DistributedDataParallel.

A small transformer in the shape of DistilBERT, on the CPU: gloo, one thread for each process. torchrun starts two
processes, and in these, on one process group, the loops are run in turns, forwards and backwards: A B C, C B A, ... So
what differs from process to process is the same for all of them, and noise that lasts hits all. Rank 0 reads the clock
in the user's step; as the gradients are averaged in each step, the other process goes at the same speed.

The raw loop runs twice in each round: the ratio of its second run to its first is what these figures leave to chance.
The ratio of time on the CPU, of rank 0 with all of its threads, is disturbed less by other programs.

Collectives are counted where Python calls torch.distributed; those of DistributedDataParallel run in C++, are the same
for all loops, and are not among them.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from .contenders import settle
from .report import Table, verdict
from .terminal import run_in_terminal

VOCABULARY, LENGTH, BATCH = (
    8000,
    64,
    32,
)  # tokens, tokens in a sequence, sequences in a process's batch
WIDTH, HEADS, HIDDEN, LAYERS = 128, 4, 512, 2
FIRST, STEPS = (
    10,
    50,
)  # the step at which the clock starts, and how many are timed: among them one of logging
ROUNDS = 5  # in one pair of processes
PROCESSES = 2
# Steps between two fingerprints: so few that the steps that are timed have two.
FINGERPRINT = 25
TARGET = 1.03

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
)  # fmt: skip

# -- the loops ------------------------------------------------------------------------------------------------


class Steps:
    """The user's code: sequences are told apart, in two classes, by their first token's output."""

    def __init__(self, look: Callable[[int], None], full: bool) -> None:
        super().__init__()
        self.look, self.full = look, full
        self.tokens, self.positions = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Embedding(LENGTH, WIDTH),
        )
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look(batch_idx)
        tokens, labels = batch  # (batch, time), (batch,)
        hidden = self.encoder(
            self.tokens(tokens) + self.positions.weight
        )  # (batch, time, width)
        loss = nn.functional.cross_entropy(self.head(hidden[:, 0]), labels)
        if self.full:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Plain(Steps, nn.Module):
    forward = Steps.training_step  # what DistributedDataParallel calls


def dataset(steps: int) -> TensorDataset:
    """As much as all processes take in so many steps."""
    size = PROCESSES * BATCH * steps
    return TensorDataset(
        torch.randint(VOCABULARY, (size, LENGTH)), torch.randint(2, (size,))
    )


def run_raw(data: TensorDataset, look: Callable[[int], None]) -> None:
    """The loop that anybody would write."""
    module = Plain(look, full=False)
    optimizer = module.configure_optimizers()
    replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data))
    for batch_idx, batch in enumerate(loader):
        loss = replica(batch, batch_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_loopwright(
    data: TensorDataset,
    look: Callable[[int], None],
    full: bool,
    folder: str,
    **arguments: Any,
) -> None:
    from loopwright.framework import Module, Trainer

    class Ours(Steps, Module):
        pass

    options: dict[str, Any] = (
        {"default_root_dir": folder} if full else {"barebones": True}
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp",
        max_epochs=1,
        **options,
        **arguments,
    )
    trainer.fit(Ours(look, full), DataLoader(data, BATCH, shuffle=True))


Runs = dict[
    str, Callable[[TensorDataset, Callable[[int], None], str], None]
]  # loops, the raw one is "raw"
RUN: Runs = {
    "raw": lambda data, look, folder: run_raw(data, look),
    "bare": lambda data, look, folder: run_loopwright(data, look, False, folder),
    "fingerprint": lambda data, look, folder: run_loopwright(
        data, look, False, folder, fingerprint=FINGERPRINT
    ),
    "full": lambda data, look, folder: run_loopwright(data, look, True, folder),
    "raw again": lambda data, look, folder: run_raw(data, look),
}
TITLES = {
    "raw again": "raw loop",
    "bare": "Loopwright, bare",
    "fingerprint": f"Loopwright, bare, processes compared every {FINGERPRINT} steps",
    "full": "Loopwright, with TensorBoard, progress bar and checkpointing",
}

# -- in two processes -----------------------------------------------------------------------------------------


def count_collectives() -> list[str]:
    """Let the names of all collectives that are called from now on be noted in the list returned."""
    called: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return wrapper

    for name in COLLECTIVES:
        setattr(dist, name, noted(name, getattr(dist, name)))
    return called


def connect() -> None:
    """Make a process group: the Trainer joins one that is there."""
    # Imported later, its functions' defaults would hold the group beyond its end, and gloo's threads with it.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo")


def measure(
    run: Callable[..., None],
    data: Callable[[int], TensorDataset],
    steps: int,
    folder: str,
    called: list[str],
) -> dict[str, Any]:
    """Seconds of a step and those on the CPU, and what collectives were called in all of them."""
    marks: list[tuple[float, float, int]] = []

    def look(batch_idx: int) -> None:
        if batch_idx in (FIRST, FIRST + steps):
            marks.append((time.perf_counter(), time.process_time(), len(called)))

    gc.collect()
    run(data(FIRST + steps + 1), look, folder)
    (start, cpu_start, before), (end, cpu_end, after) = marks
    return {
        "step_s": (end - start) / steps, "cpu_s": (cpu_end - cpu_start) / steps, "collectives": called[before:after]
    }  # fmt: skip


def measure_rounds(
    runs: Runs, data: Callable[[int], TensorDataset], steps: int, folder: str
) -> list[dict[str, Any]]:
    settle()
    called = count_collectives()
    connect()
    for run in runs.values():
        measure(run, data, 1, folder, called)  # imports what will be needed
    rounds = []
    for turn in range(ROUNDS):
        names = list(runs) if turn % 2 == 0 else list(reversed(runs))
        rounds.append(
            {name: measure(runs[name], data, steps, folder, called) for name in names}
        )
    return rounds


def work(
    runs: Runs, data: Callable[[int], TensorDataset], steps: int, folder: str
) -> None:
    rounds = measure_rounds(runs, data, steps, folder)
    if dist.get_rank() == 0:
        Path(folder, "rounds.json").write_text(json.dumps(rounds))
    dist.destroy_process_group()


# -- in the parent --------------------------------------------------------------------------------------------


def launch(
    module: str,
    *arguments: str,
    processes: int = PROCESSES,
    environment: Sequence[str] = (),
) -> None:
    """Run a module of this package as a program of several processes, by torchrun."""
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    )
    run_in_terminal(
        "the loop of several processes",
        ("env", *environment, *launcher, "-m", module, *arguments),
    )


def start_rounds(module: str, steps: int, *arguments: str) -> list[dict[str, Any]]:
    """`measure_rounds` in fresh processes: `work` is what the module is to run."""
    with tempfile.TemporaryDirectory() as folder:
        launch(module, str(steps), folder, *arguments)
        return json.loads(Path(folder, "rounds.json").read_text())


def ratios(found: list[dict[str, Any]], name: str, kind: str = "step_s") -> list[float]:
    """The quartiles of a loop's ratios to the raw one."""
    return statistics.quantiles(
        [each[name][kind] / each["raw"][kind] for each in found], n=4
    )


def is_noisy(found: list[dict[str, Any]]) -> bool:
    """Whether two runs of the raw loop differ by more than the target."""
    lowest, _, highest = ratios(found, "raw again")
    return max(1 - lowest, highest - 1) > TARGET - 1


def compare(rounds: int, quick: bool = False) -> Table:
    steps = STEPS // 5 if quick else STEPS
    found: list[dict[str, Any]] = []
    while len(found) < rounds:
        found += start_rounds(__name__, steps)
    noisy = is_noisy(found)
    rows, figures = [], {}
    for name, label in TITLES.items():
        low, median, high = ratios(found, name)
        cpu = ratios(found, name, "cpu_s")[1]
        runs = [each[name] for each in found]
        collectives = statistics.mean(len(run["collectives"]) for run in runs) / steps
        target = None if name == "raw again" else TARGET
        rows.append([
            label, f"{median:.3f}", f"{low:.3f} – {high:.3f}", f"{cpu:.3f}", *verdict(median, target, noisy=noisy),
            f"{collectives:.2f}",
        ])  # fmt: skip
        figures[name] = {
            "ratio": median, "quartiles": [low, high], "cpu_ratio": cpu, "target": target,
            "collectives_per_step": collectives, "runs": runs,
        }  # fmt: skip
    raw = statistics.median(each["raw"]["step_s"] for each in found)
    return Table(
        "A step of two processes (DDP), as a ratio to the raw loop's",
        ("", "ratio", "quartiles", "CPU", "target", "", "collectives"),
        rows,
        {"raw_s": raw, "raw": [each["raw"] for each in found], "loops": figures},
        [
            f"The raw loop's step takes {raw * 1e3:.0f} ms. Medians over {len(found)} rounds. Collectives of a step "
            "are those beside DistributedDataParallel's own.",
        ],
    )


if __name__ == "__main__":
    work(RUN, dataset, int(sys.argv[1]), sys.argv[2])
