"""Run the benchmarks and print their figures as tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch.
os.environ.update(OMP_NUM_THREADS="1", DO_NOT_TRACK="1")
# Installed packages have their bytecode; without that of a checkout, it would be compiled in each process.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from . import (
    calls,
    checkpoint,
    ddp,
    faults,
    imports,
    kills,
    launch,
    matrix,
    planning,
    program,
    replays,
    restarts,
    resuming,
    saving,
    sharded,
    size,
    step_overhead,
    watching,
    workers,
)
from .contenders import missing, settle
from .gpu import run as gpu
from .report import BEGIN, END, Table, has_marks, machine, put_into

LONG = (  # run by name only
    "kills",
    "restarts",
    "workers",
    "faults",
    "plan",
    "replays",
    "gpu",
)
BENCHMARKS = (
    "step",
    "matrix",
    "calls",
    "import",
    "checkpoint",
    "saving",
    "resuming",
    "size",
    "ddp",
    "sharded",
    "launch",
    "program",
    "watching",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join((*BENCHMARKS, *LONG))
    parser.add_argument(
        "benchmark",
        nargs="*",
        help=f"which ones of {names} (default: all but {', '.join(LONG)})",
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="how often to kill a training (default: 200)",
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=10_000,
        help="how many workers to start (default: 10000)",
    )
    parser.add_argument(
        "--replays",
        type=int,
        default=20,
        help="how many steps to go back to (default: 20)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=100_000,
        help="of replays: how many to train undisturbed (default: 100000)",
    )
    parser.add_argument(
        "--part",
        choices=("grid", "sample", "all"),
        default="all",
        help="of faults: the whole grid, or those of other launchers and strategies (default: all)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="of faults and matrix: cells with such a name, as in 'SIGKILL / mid / rank 1' and 'iterable × clipping'; "
        "of gpu: parts with one",
    )
    parser.add_argument(
        "--lanes",
        type=int,
        default=2,
        help="of faults: how many run at a time (default: 2)",
    )
    parser.add_argument(
        "--hang-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="of faults: after which what does not move has hung (default: 10)",
    )
    parser.add_argument(
        "--lines",
        type=Path,
        metavar="FILE",
        help="of faults: write each outcome there as a line of JSON, and beside it the output of those that fail",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="how often to measure each time (default: 15 for steps, 7 else)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer and shorter rounds: to see whether all works",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="put the tables into this page; others stay",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.benchmark) - {*BENCHMARKS, *LONG}:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {names}"
        )
    if "gpu" in options.benchmark:
        refused = gpu.refusal(options.quick, options.markdown is not None)
        if refused:
            parser.error(refused)
    if options.markdown and not has_marks(options.markdown):
        parser.error(
            f"{options.markdown} needs the lines {BEGIN} and {END}, for the tables to stand between"
        )
    return options


def run(options: argparse.Namespace) -> Iterator[tuple[str, Table]]:
    rounds = options.rounds or (3 if options.quick else 7)
    wanted = options.benchmark or BENCHMARKS
    if "step" in wanted:
        for full in (False, True):
            step_rounds = options.rounds or (
                step_overhead.PAIRS if options.quick else 15
            )
            yield (
                f"step_{'full' if full else 'bare'}",
                step_overhead.compare(full, step_rounds, options.quick),
            )
    if "matrix" in wanted:
        timed = matrix.TIMED // (4 if options.quick else 1)
        yield "matrix", matrix.compare(options.only, rounds, timed)
    if "calls" in wanted:
        yield "calls", calls.compare()
    if "import" in wanted:
        yield "import", imports.compare(rounds)
    if "checkpoint" in wanted:
        yield "checkpoint", checkpoint.compare(rounds)
    if "saving" in wanted:
        yield "saving", saving.compare(rounds)
    if "resuming" in wanted:
        yield "resuming", resuming.compare()
    if "size" in wanted:
        yield "size", size.compare()
    loop_rounds = options.rounds or (ddp.ROUNDS if options.quick else 4 * ddp.ROUNDS)
    if "ddp" in wanted:
        for processes in (2, 1):
            table = ddp.compare(loop_rounds, options.quick, processes)
            yield f"ddp_{processes}", table
    if "sharded" in wanted:
        memory = sharded.compare_memory()
        yield "sharded_memory", memory
        yield "sharded_saving", sharded.compare_saving(memory)
        yield (
            "sharded_time",
            sharded.compare_time(loop_rounds, options.quick),
        )
    if "launch" in wanted:
        yield "launch", launch.compare(rounds)
    if "program" in wanted:
        yield "program", program.compare(rounds)
    if "watching" in wanted:
        yield "watching", watching.compare()
    if "plan" in wanted:
        yield "plan", planning.compare()
    if "kills" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield "kills", kills.compare(options.kills, Path(folder))
    if "restarts" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield "restarts", restarts.compare(min(options.kills, 18), Path(folder))
    if "replays" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield (
                "replays",
                replays.compare(options.replays, options.steps, Path(folder)),
            )
    if "workers" in wanted:
        yield "workers", workers.compare(options.starts)
    if "gpu" in wanted:
        yield from gpu.compare(options.rounds, options.quick, options.only)
    if "faults" in wanted:
        tables = faults.compare(
            options.part,
            options.only,
            options.lanes,
            options.hang_timeout,
            options.lines,
        )
        yield from zip(("faults", "faults_1", "faults_2"), tables, strict=False)


def main() -> int:
    options = parse()
    settle()
    about = [f"Measured in {machine()}."]
    about += [f"{name} is not installed and is left out." for name in missing()]
    print(*about, sep="\n")
    tables: dict[str, Table] = {}
    for name, table in run(options):
        tables[name] = table
        print(f"\n{table}", flush=True)
    if options.json:
        figures = {
            "about": about,
            **{name: table.figures for name, table in tables.items()},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.markdown:
        put_into(
            options.markdown, about, list(tables.values()), keep=bool(options.benchmark)
        )
    falls_short = "faults" in tables and tables["faults"].figures["short"] > 0
    gpu_failed = any(table.figures.get("gpu_failed") for table in tables.values())
    return int(falls_short or gpu_failed)


if __name__ == "__main__":
    sys.exit(main())
