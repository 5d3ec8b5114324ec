"""What it costs to watch a run and to agree on its end, in two processes: `python -m benchmarks watching`.

The processes train in steps of 1 ms, or of 500 ms, under `ddp`. Of the thread that looks whether the run moves, its own
clock of CPU time is read; it runs beside the step, and takes no more of it than that. Collectives are counted where
Python calls torch.distributed, from one step to a later one. A stop is requested by SIGTERM, in one process.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loopwright.framework import Module, Trainer
from loopwright.strategies.launch.launcher import call_in_processes

from .ddp import count_collectives
from .report import Table, verdict

RANKS = 2
FIRST = 200  # the step of 1 ms at which the clocks start
STEPS = 8_000
SECONDS_OF_A_STEP = (0.001, 0.5)
# 0.2% of a step of 1 ms, in µs, and the longest time to a stop, in seconds.
STEP_TARGET, STOP_TARGET = 2.0, 2.0
# The time-outs are those by default, 150 times shorter; so is a validation of ten minutes.
TIMEOUTS = {"train": 2.0, "validate": 12.0, "setup": 60.0}
VALIDATION = 4.0


class Waiting(Module):
    """Steps that take as long as they are told to.

    Args:
        seconds: of a step.
        look: called in each step with its index.
        validation: seconds that rank 1 takes in a validation batch.
    """

    def __init__(
        self, seconds: float, look: Callable[[int], None], validation: float = 0.0
    ) -> None:
        super().__init__()
        self.seconds, self.look, self.validation = seconds, look, validation
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.look(batch_idx)
        time.sleep(self.seconds)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.global_rank == 1:
            time.sleep(self.validation)
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer_for(steps: int, **options: Any) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(
        accelerator="cpu", strategy="ddp", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


# -- in the processes -------------------------------------------------------------------------------------------------


def watchers_time() -> float:
    """CPU seconds of this process's threads that watch its run."""
    threads = [thread for thread in threading.enumerate() if "heartbeat" in thread.name]
    clocks = [time.pthread_getcpuclockid(thread.ident or 0) for thread in threads]
    assert clocks, "no thread watches this run"
    return sum(map(time.clock_gettime, clocks))


def agents_time() -> float:
    """CPU seconds of the process that has started this one, in which the ranks are watched from outside."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count_costs() -> list[dict[str, float]]:
    """What each rank counts from the first step to the last."""
    marks: list[tuple[float, float, float, int]] = []
    called = count_collectives()

    def look(batch_idx: int) -> None:
        if batch_idx in (FIRST, FIRST + STEPS):
            marks.append((time.time(), watchers_time(), agents_time(), len(called)))

    trainer = trainer_for(FIRST + STEPS + 1, max_epochs=1)
    # They are dealt out to the ranks.
    batches = [torch.ones(4, 8)] * (RANKS * (FIRST + STEPS + 1))
    trainer.fit(Waiting(SECONDS_OF_A_STEP[0], look), batches)
    names = ("seconds", "watching", "agent", "collectives")
    counts = {name: end - start for name, start, end in zip(names, *marks, strict=True)}
    return trainer.strategy.gather_objects(counts)


def stop(seconds: float, folder: str) -> None:
    """Send SIGTERM to rank 1 in the middle of a training, and note how long each rank goes on."""
    when = int(3 / seconds)

    def look(batch_idx: int) -> None:
        if batch_idx == when and trainer.global_rank == 1:
            Path(folder, "sent").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_for(-1, max_epochs=-1)
    try:
        trainer.fit(
            Waiting(seconds, look), [torch.ones(4, 8)] * (when + int(10 / seconds))
        )
    except SystemExit:
        Path(folder, f"rank-{trainer.global_rank}").write_text(str(time.time()))


def validate_long() -> bool:
    """Whether a long validation of one rank goes well."""
    trainer = trainer_for(2, hang_timeout=TIMEOUTS, num_sanity_val_steps=0)
    batches = [torch.ones(4, 8)] * 2
    trainer.fit(
        Waiting(0.0, lambda batch_idx: None, VALIDATION), batches, [torch.ones(4, 8)]
    )
    return trainer.state.finished


# -- in the parent ----------------------------------------------------------------------------------------------------


def time_to_stop(seconds: float) -> float:
    """Seconds from a signal until the last rank has left `fit`."""
    with tempfile.TemporaryDirectory() as folder:
        call_in_processes(stop, (seconds, folder), RANKS)
        sent = float(Path(folder, "sent").read_text())
        return (
            max(
                float(Path(folder, f"rank-{rank}").read_text()) for rank in range(RANKS)
            )
            - sent
        )


def compare() -> Table:
    counts = call_in_processes(count_costs, (), RANKS)
    share = max(one["watching"] / one["seconds"] for one in counts)
    agent = max(one["agent"] / one["seconds"] for one in counts)
    collectives = max(one["collectives"] for one in counts) / STEPS
    first = [
        "CPU time of the thread that watches, for a step of 1 ms",
        f"{share * 1e3:.2f} µs",
    ]
    rows: list[Sequence[str]] = [
        [*first, *verdict(share * 1e3, STEP_TARGET, " µs")],
        [
            "CPU time of the agent, which watches the processes, in a second",
            f"{agent * 1e3:.0f} ms",
            "",
            "",
        ],
        ["collectives of ours in a step of 1 ms", f"{collectives:.4f}", "", ""],
    ]
    stops = {seconds: time_to_stop(seconds) for seconds in SECONDS_OF_A_STEP}
    for seconds, took in stops.items():
        row = [
            f"from SIGTERM to one rank until all have left `fit`, in steps of {seconds * 1e3:g} ms",
            f"{took:.2f} s",
        ]
        rows.append([*row, *verdict(took, STOP_TARGET, " s")])
    call_in_processes(validate_long, (), RANKS)
    rows.append(
        [
            "false alarms in a validation of one rank for twice the time-out of training",
            "0",
            "0",
            "pass",
        ]
    )
    figures = {"ranks": counts, "stops_s": stops}
    return Table(
        "Watching a run of two processes (DDP), and stopping it",
        ("", "", "target", ""),
        rows,
        figures,
    )
