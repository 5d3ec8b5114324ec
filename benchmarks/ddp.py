"""What a step of a process, or of two, costs in the Trainer, as a ratio to a loop by hand.

A small transformer in the shape of DistilBERT, on the CPU: one thread for each process; two of them by gloo and
DistributedDataParallel. Each loop runs in processes of its own, as the Trainer lets glibc keep memory, which would hold
for a loop by hand in the same process: A, B, C, then C, B, A, ... Rank 0 reads the clock in the user's step; as the
gradients are averaged in each step, the other process goes at the same speed.

The raw loop runs twice in each round: the ratio of its second run to its first is what these figures leave to chance.
What is counted is disturbed less by other programs: time on the CPU, of rank 0 with all of its threads, page faults (in
which nothing is read from a disk), and switches to other threads and programs.

Collectives are counted where Python calls torch.distributed; those of DistributedDataParallel run in C++, are the same
for all loops, and are not among them.
"""

from __future__ import annotations

import gc
import json
import os
import resource
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
ROUNDS = 4  # in one pair of processes
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
TARGET = 0.98
FAULTS = 50  # in a step, at most
NOISE = 0.03  # two runs of the raw loop may differ by so much
# Steps between two fingerprints: so few that the steps that are timed have two.
FINGERPRINT = 25

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
    replica: Any = module
    sampler = None
    if PROCESSES > 1:
        replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
        sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler, shuffle=sampler is None)
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
    "raw again": "raw loop, again",
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


def usage(called: list[str]) -> dict[str, float]:
    """What this process has used until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "step_s": time.perf_counter(), "cpu_s": used.ru_utime + used.ru_stime, "system_s": used.ru_stime,
        "faults": used.ru_minflt, "switches": used.ru_nvcsw + used.ru_nivcsw, "collectives": len(called),
    }  # fmt: skip


def measure(
    run: Callable[..., None],
    data: Callable[[int], TensorDataset],
    steps: int,
    folder: str,
    called: list[str],
) -> dict[str, float]:
    """What a step takes: seconds, of them on the CPU and in the system, faults, switches, collectives of Python's."""
    marks: list[dict[str, float]] = []

    def look(batch_idx: int) -> None:
        if batch_idx in (FIRST, FIRST + steps):
            marks.append(usage(called))

    gc.collect()
    run(data(FIRST + steps + 1), look, folder)
    start, end = marks
    return {kind: (end[kind] - start[kind]) / steps for kind in start}


def work(
    run: Callable[..., None],
    data: Callable[[int], TensorDataset],
    steps: int,
    folder: str,
) -> None:
    """Measure one loop several times, in these processes."""
    settle()
    called = count_collectives()
    if PROCESSES > 1:
        connect()
    measure(run, data, 1, folder, called)  # imports what will be needed
    rounds = [measure(run, data, steps, folder, called) for _ in range(ROUNDS)]
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    if os.environ.get("RANK", "0") == "0":
        found = [{**each, "peak_mb": peak} for each in rounds]
        Path(folder, "rounds.json").write_text(json.dumps(found))
    if PROCESSES > 1:
        dist.destroy_process_group()


# -- in the parent --------------------------------------------------------------------------------------------


def launch(
    module: str,
    *arguments: str,
    processes: int = 2,
    environment: Sequence[str] = (),
) -> None:
    """Run a module of this package as a program: of several processes by torchrun."""
    launcher: tuple[str, ...] = (sys.executable,)
    if processes > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone")
        launcher = (*launcher, *torchrun, f"--nproc-per-node={processes}")
    run_in_terminal(
        "the loop of several processes",
        ("env", *environment, *launcher, "-m", module, *arguments),
    )


def run_rounds(
    module: str,
    names: Sequence[str],
    rounds: int,
    steps: int,
    *arguments: str,
    processes: int = 2,
) -> list[dict[str, dict[str, float]]]:
    """What each loop takes in each round, in processes of its own: `work` is what the module is to run."""
    found: list[dict[str, dict[str, float]]] = []
    turn = 0
    while len(found) < rounds:
        order = names if turn % 2 == 0 else tuple(reversed(names))
        taken: dict[str, list[dict[str, float]]] = {}
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                launch(
                    module, str(steps), folder, name, *arguments, processes=processes
                )
                taken[name] = json.loads(Path(folder, "rounds.json").read_text())
        found += [{name: taken[name][at] for name in names} for at in range(ROUNDS)]
        turn += 1
    return found


def ratios(found: list[dict[str, Any]], name: str, kind: str = "step_s") -> list[float]:
    """The quartiles of a loop's ratios to the raw one."""
    return statistics.quantiles(
        [each[name][kind] / each["raw"][kind] for each in found], n=4
    )


def is_noisy(found: list[dict[str, Any]], kind: str = "step_s") -> bool:
    """Whether two runs of the raw loop differ by much."""
    lowest, _, highest = ratios(found, "raw again", kind)
    return max(1 - lowest, highest - 1) > NOISE


HEADER = (
    "", "ratio", "quartiles", "CPU", "target", "wall", "CPU", "faults", "target", "", "system, ms", "switches",
    "peak, MB",
)  # fmt: skip


def row(
    label: str, found: list[dict[str, Any]], name: str, target: float | None
) -> list[str]:
    """A loop's row in the table: ratios to the raw loop, and counts of a step."""
    low, median, high = ratios(found, name)
    cpu = ratios(found, name, "cpu_s")[1]

    def middle(kind: str) -> float:
        return statistics.median(each[name][kind] for each in found)

    aim, wall = verdict(median, target, noisy=is_noisy(found))
    _, on_cpu = verdict(cpu, target, noisy=is_noisy(found, "cpu_s"))
    return [
        label, f"{median:.3f}", f"{low:.3f} – {high:.3f}", f"{cpu:.3f}", aim, wall, on_cpu,
        f"{middle('faults'):.0f}", *verdict(middle("faults"), FAULTS if target else None),
        f"{1e3 * middle('system_s'):.1f}", f"{middle('switches'):.0f}", f"{middle('peak_mb'):.0f}",
    ]  # fmt: skip


def compare(rounds: int, quick: bool = False, processes: int = 2) -> Table:
    steps = STEPS // 5 if quick else STEPS
    # One process has none to be compared with.
    left_out = "fingerprint" if processes == 1 else ""
    names = tuple(name for name in RUN if name != left_out)
    found = run_rounds(__name__, names, rounds, steps, processes=processes)
    rows: list[Sequence[str]] = [row("raw loop", found, "raw", None)]
    for name, label in TITLES.items():
        if name not in names:
            continue
        target = None if name == "raw again" else TARGET
        rows.append(row(label, found, name, target))
    raw = statistics.median(each["raw"]["step_s"] for each in found)
    own = statistics.mean(each["full"]["collectives"] for each in found)
    kind = "two processes (DDP)" if processes == 2 else "one process"
    return Table(
        f"A step of {kind}, as a ratio to the raw loop's",
        HEADER,
        rows,
        {"rounds": found},
        [
            f"The raw loop's step takes {raw * 1e3:.0f} ms. Medians over {len(found)} rounds; faults, time in the "
            f"system and switches are those of a step. Collectives of ours in a step: {own:.2f}.",
        ],
    )


if __name__ == "__main__":
    work(RUN[sys.argv[3]], dataset, int(sys.argv[1]), sys.argv[2])
