"""What becomes of a training when something goes wrong: `python -m benchmarks faults`.

Each cell is a training of its own, of the program :mod:`.faulty`: one fault, in one phase, of one rank, with
`hang_timeout=10`. Asked of each: Does it end, within 15 s of the fault, and not with exit code 0? Does the first report
name the rank, the place and the line? Is nothing left behind, neither processes nor files? And where there was a
checkpoint, does the training that is started again end as an undisturbed one: weights, optimizer states and generators
of random numbers, bit for bit?

Two cells run at a time. Programs are started as users start them. The trainings that are only to resume are forked from
a process that has imported everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from .faulty import Settings, train
from .forked import fork_ranks, wait
from .kills import content
from .report import Table

GRACE = 5.0  # seconds after the fault and `hang_timeout`
CAP = 50.0  # seconds after the fault, when nobody waits any longer
START = 120.0  # seconds from the start to the fault
# For a training that is started again; DeepSpeed may have to compile something.
RESUME = 150.0
STEP = 0.02  # seconds, so that a fault is in the middle of something
MARK = "LOOPWRIGHT_FAULTS"  # the variable by which all that descends from a program is found

PHASES = {
    "setup": "in the hook `setup`",
    "first": "in the first batch",
    "mid": "in the middle of the second epoch",
    "validation": "in a validation batch",
    "save": "in `on_save_checkpoint`",
    "write": "in the thread that writes a checkpoint",
    "teardown": "in the hook `teardown`",
}
DEAD = ("SIGKILL", "exit 0", "worker killed")  # of these no stack can be shown
HANGS = (
    "SIGSTOP",
    "endless loop",
    "sleep",
    "blocks in C",
    "blocks in C with Python's lock",
)
FAULTS = (
    "raise", "out of memory", "exit 0", "exit 3", "SIGKILL", *HANGS, "callback raises", "worker raises",
    "worker killed", "other keys", "other batches", "SIGTERM", "agent gets SIGTERM", "agent gets SIGKILL",
)  # fmt: skip
CHECKS = {
    "ends": "ends in time",
    "code": "exit code not 0",
    "rank": "the first report names the rank",
    "place": "… and the place",
    "trace": "… and the traceback or stack",
    "clean": "leaves no process, file or shared memory",
    "resumes": "resumes bit-equal",
}


@dataclass(frozen=True)
class Cell:
    """What goes wrong where, and how the program was started.

    Attributes:
        fault: one of FAULTS.
        phase: one of PHASES.
        rank: of the process in which it goes wrong.
        devices: number of processes.
        strategy: the Trainer's.
        launcher: `"own"`, `"torchrun"`, or `"environment"` for processes without an agent.
    """

    fault: str
    phase: str
    rank: int = 0
    devices: int = 2
    strategy: str = "ddp"
    launcher: str = "own"

    @property
    def name(self) -> str:
        kind = "" if self.group == GRID else f" ({self.group})"
        return f"{self.fault} / {self.phase} / rank {self.rank}{kind}"

    @property
    def group(self) -> str:
        if self.devices == 1:
            return "one process"
        how = {"own": "", "torchrun": "torchrun", "environment": "without an agent"}
        words = (f"{self.devices} processes", self.strategy, how[self.launcher])
        return ", ".join(filter(None, words))

    @property
    def has_workers(self) -> bool:
        return self.fault.startswith("worker")

    @property
    def has_stream(self) -> bool:
        return (self.fault, self.phase) == ("other batches", "mid")

    def settings(self, folder: Path, **values: Any) -> Settings:
        """The program's, undisturbed."""
        strategy = "auto" if self.devices == 1 else self.strategy
        workers = int(self.has_workers)
        return Settings(
            str(folder),
            strategy=strategy,
            devices=self.devices,
            workers=workers,
            stream=self.has_stream,
            **values,
        )


GRID = Cell("", "").group


@dataclass
class Outcome:
    """What has come of a cell.

    Attributes:
        cell: its name.
        seconds: from the fault until all processes were gone; None if they were not.
        codes: exit codes of what was started.
        first: the first line of the report.
        failed: those of CHECKS that do not hold.
        held: those that do; what is in neither was not to be asked.
        left: what was left behind.
        resumed: how the training went that was started again.
    """

    cell: str
    seconds: float | None = None
    codes: list[int | None] = field(default_factory=list)
    first: str = ""
    failed: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    resumed: str = ""

    def note(self, check: str, holds: bool) -> None:
        (self.held if holds else self.failed).append(check)

    def __str__(self) -> str:
        seconds = "hangs" if self.seconds is None else f"{self.seconds:.1f} s"
        failed = f"FAILS {', '.join(self.failed)}" if self.failed else "holds"
        codes = ",".join(map(str, self.codes))
        return (
            f"{self.cell:56} {seconds:>7}  code {codes:8} {failed} | {self.first[:110]}"
        )


# -- which cells there are --------------------------------------------------------------------------------------------


def left_out(fault: str, phase: str, rank: int) -> str:
    """Why a cell makes no sense; empty if it does."""
    if fault.startswith("worker") and phase not in ("first", "mid", "validation"):
        return "no worker is at work"
    if fault == "other batches" and phase not in ("first", "mid", "validation"):
        return "no loader is read"
    if fault == "other keys" and phase not in ("first", "mid", "validation"):
        return "nothing is logged"
    if fault == "callback raises" and phase == "write":
        return "no callback runs in that thread"
    if phase == "write" and rank:
        return "under ddp, rank 0 writes"
    if fault.startswith("agent") and rank:
        return "there is one agent for both ranks"
    return ""


def grid() -> Iterator[Cell]:
    for fault in FAULTS:
        for phase in PHASES:
            for rank in (0, 1):
                if not left_out(fault, phase, rank):
                    yield Cell(fault, phase, rank)


def sample() -> Iterator[Cell]:
    """Of other numbers of processes, strategies and launchers."""
    stuck = ("SIGSTOP", "endless loop", "blocks in C with Python's lock")
    for launcher in ("torchrun", "environment"):
        for fault in (
            "raise",
            "SIGKILL",
            "exit 0",
            "exit 3",
            "SIGTERM",
            "other keys",
            *stuck,
        ):
            yield Cell(fault, "mid", 1, launcher=launcher)
        yield Cell("raise", "setup", 1, launcher=launcher)
        yield Cell("endless loop", "validation", 0, launcher=launcher)
    yield Cell("agent gets SIGTERM", "mid", 0, launcher="torchrun")
    yield Cell("agent gets SIGKILL", "mid", 0, launcher="torchrun")
    yield Cell("SIGKILL", "write", 1, strategy="fsdp", launcher="environment")
    for strategy in ("fsdp", "deepspeed_stage_2"):
        for fault, phase in (
            ("raise", "mid"), ("raise", "validation"), ("raise", "write"), ("SIGKILL", "save"), ("SIGKILL", "write"),
            ("exit 0", "teardown"), ("endless loop", "mid"), ("SIGSTOP", "validation"),
        ):  # fmt: skip
            yield Cell(fault, phase, 1, strategy=strategy)
    for fault in ("raise", "SIGKILL", "exit 0", "other keys", "SIGTERM", *stuck):
        yield Cell(fault, "mid", 2, devices=3)
    yield Cell("callback raises", "save", 1, devices=3)
    for fault, phase in (
        ("raise", "mid"), ("exit 3", "validation"), ("SIGTERM", "mid"), ("worker killed", "mid"), ("raise", "write"),
        ("endless loop", "setup"), ("endless loop", "mid"), ("blocks in C", "write"),
        ("blocks in C with Python's lock", "mid"), ("SIGKILL", "save"),
    ):  # fmt: skip
        yield Cell(fault, phase, 0, devices=1)


# -- running one ------------------------------------------------------------------------------------------------------


class Job:
    """Programs that were started together, and all that descends from them."""

    def __init__(self, cell: Cell, settings: Settings, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.log = folder / "log"
        self.shared_memory = set(os.listdir("/dev/shm"))
        foreign = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_",
            "MASTER_",
            "TORCHELASTIC",
            "LOOPWRIGHT",
        )
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(foreign)
        }
        self.environment |= {MARK: self.mark, "TMPDIR": str(self.temporary)}
        # torch makes it, and keeps it for all programs of a user.
        self.environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torchinductor")
        self.programs: list[subprocess.Popen[bytes]] = []
        program = str(Path(__file__).with_name("faulty.py"))
        arguments = (program, json.dumps(asdict(settings)))
        if cell.launcher == "environment":
            self.start_ranks(cell.devices, arguments)
        elif cell.launcher == "torchrun":
            # Without a folder for logs, torchrun leaves a temporary one.
            logs = str(folder / "torchrun")
            options = (
                "--standalone",
                "--nproc-per-node",
                str(cell.devices),
                "--log-dir",
                logs,
            )
            self.start("-m", "torch.distributed.run", *options, *arguments)
        else:
            self.start(*arguments)

    def start_ranks(self, ranks: int, arguments: tuple[str, ...]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(ranks):
            self.start(*arguments, **shared, RANK=rank, LOCAL_RANK=rank)

    def start(self, *arguments: str, **variables: Any) -> None:
        environment = self.environment | {k: str(v) for k, v in variables.items()}
        with self.log.open("ab") as log:
            self.programs.append(
                subprocess.Popen(
                    (sys.executable, *arguments),
                    env=environment,
                    cwd=self.log.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def is_running(self) -> bool:
        return any(program.poll() is None for program in self.programs)

    def living(self) -> list[int]:
        """Its processes, but for zombies, which have no environment."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in file.read_bytes():
                    found.append(int(file.parent.name))
        return found

    def kill(self) -> None:
        for process in self.living():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for program in self.programs:
            program.wait()

    def files_left(self) -> list[str]:
        return [file.name for file in self.temporary.iterdir()]

    def shared_memory_left(self) -> list[str]:
        new = set(os.listdir("/dev/shm")) - self.shared_memory
        # Of semaphores, torch and Python remove the names at once; those that stay are other programs'.
        paths = [
            f"/dev/shm/{name}" for name in sorted(new) if not name.startswith("sem.")
        ]
        return [path for path in paths if not is_mapped(path)]


def is_mapped(path: str) -> bool:
    """Whether a running process has a file in its memory: then it is of another program, as this one has ended."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if path in maps.read_text():
                return True
    return False


@dataclass(frozen=True)
class Conditions:
    """What all cells have in common.

    Attributes:
        hang_timeout: the Trainer's.
        folder: for all that they write.
        lines: a file to which each adds its outcome, as a line of JSON. Beside it stays the output of those that fail.
    """

    hang_timeout: float
    folder: Path
    lines: Path

    @property
    def references(self) -> Path:
        """What undisturbed trainings have left."""
        return self.folder / "references"


def run_cell(cell: Cell, folder: Path, conditions: Conditions) -> Outcome:
    """Run a cell in a folder of its own, and start its training again where there is a checkpoint."""
    outcome = Outcome(cell.name)
    values = {"fault": cell.fault, "phase": cell.phase, "rank": cell.rank}
    settings = cell.settings(
        folder / "run",
        **values,
        hang_timeout=conditions.hang_timeout,
        step_seconds=STEP,
    )
    (folder / "run").mkdir(parents=True)
    job = Job(cell, settings, folder)
    ended = watch(job, folder / "run" / "struck")
    outcome.left = [f"process {process}" for process in job.living()] if ended else []
    outcome.codes = [program.poll() for program in job.programs]
    job.kill()
    outcome.left += job.files_left()
    struck = struck_at(folder / "run" / "struck")
    if struck is None:
        outcome.first = (
            f"the fault did not happen: {job.log.read_text(errors='replace')[-300:]!r}"
        )
        outcome.failed = [check for check in CHECKS if check != "clean"]
        return outcome
    if ended:
        outcome.seconds = round(ended - struck, 1)
    limit = conditions.hang_timeout + GRACE
    outcome.note("ends", ended is not None and ended - struck <= limit)
    codes = outcome.codes
    if cell.fault == "exit 0" and cell.launcher == "environment":
        codes = [code for rank, code in enumerate(codes) if rank != cell.rank]
    outcome.note("code", all(code not in (0, None) for code in codes))
    judge_report(cell, job.log.read_text(errors="replace"), outcome)
    if any((folder / "run" / "saved").glob("*.ckpt")):
        outcome.resumed = resume(cell, folder, conditions.references)
        outcome.note("resumes", outcome.resumed == "bit-equal")
    outcome.left += job.shared_memory_left()
    return outcome


def watch(job: Job, struck: Path) -> float | None:
    """Wait for the end of a job; when that was, in seconds since 1970, or None."""
    began = time.time()
    while job.is_running():
        since = time.time() - (struck_at(struck) or began)
        if since > (CAP if struck.exists() else START):
            return None
        time.sleep(0.03)
    ended = time.time()
    # Those that it has started may need a moment more.
    until = ended + 5
    while time.time() < until and job.living():
        ended = time.time()
        time.sleep(0.03)
    return ended


def struck_at(file: Path) -> float | None:
    """When the fault happened, in seconds since 1970; None if it did not yet."""
    try:
        return float(file.read_text() or time.time())
    except FileNotFoundError:
        return None


HEADLINE = re.compile(r"^(?:Rank (\d+) of \d+|This process) (.*)$", re.MULTILINE)
# What stands in the headline, by phase.
PLACES = {
    "setup": "in setup",
    "first": "epoch 0, batch 0",
    "mid": "epoch 1, batch 4",
    "validation": "in validation",
    "save": "checkpoint",
    "write": "checkpoint|epoch 1, batch",
    "teardown": "in teardown",
}


def judge_report(cell: Cell, text: str, outcome: Outcome) -> None:
    """Look whether the first report names rank, place and line."""
    if cell.fault == "agent gets SIGKILL":
        # There is nobody left to report.
        return
    if "SIGTERM" in cell.fault:
        told = [line for line in text.splitlines() if "SIGTERM" in line]
        outcome.first = (told or [""])[0]
        outcome.note("rank", bool(told))
        return
    reports = list(HEADLINE.finditer(text))
    if cell.launcher == "environment":
        # Each rank prints what it knows when it knows it, and those that lose a peer may be first.
        reports = [
            report for report in reports if not report[2].startswith("lost its peers")
        ] or reports
    if not reports and cell.devices == 1 and cell.fault not in HANGS:
        # A process alone ends as any program does: with its traceback, or with the signal that killed it.
        outcome.first = (text.splitlines() or [""])[-1]
        # `sys.exit` of a program alone is no error.
        if cell.fault not in (*DEAD, "exit 3"):
            outcome.note("trace", "in strike" in text or "DataLoader worker" in text)
        return
    if not reports:
        lines = (
            [line for line in text.splitlines() if "Error" in line]
            or text.splitlines()
            or [""]
        )
        outcome.first = lines[-1]
        outcome.failed += ["rank", "place", "trace"]
        return
    report = reports[0]
    outcome.first = report[0]
    after = [other.start() for other in reports if other.start() > report.start()]
    section = text[report.start() : (after or [len(text)])[0]]
    names = int(report[1] or 0) == cell.rank
    shows = "in strike" in section or (
        cell.fault == "worker killed" and "DataLoader worker" in section
    )
    place = PLACES[cell.phase]
    if cell.fault in ("other keys", "other batches"):
        # All ranks find it out, and say which one differs.
        names = f"rank {cell.rank}" in section
        shows = "Error" in section
    if cell.fault.startswith(("other", "worker")):
        # They are found out later.
        place = r"epoch \d"
    outcome.note("rank", names)
    outcome.note("place", names and re.search(place, report[2]) is not None)
    if cell.fault not in DEAD:
        outcome.note("trace", names and shows)


# -- starting it again ------------------------------------------------------------------------------------------------


def reference_folder(cell: Cell, references: Path) -> Path:
    kind = f"{cell.devices}-{cell.strategy}{'-workers' * cell.has_workers}{'-stream' * cell.has_stream}"
    return references / kind


def make_references(cells: Iterable[Cell], references: Path) -> None:
    """Train undisturbed, once for each kind of training; where that does not go well, nothing resumes as it did."""
    for cell in cells:
        folder = reference_folder(cell, references)
        if not folder.exists() and (told := train_to_end(cell, folder)):
            print(f"{folder.name}: an undisturbed training {told}", flush=True)


def train_to_end(cell: Cell, folder: Path) -> str:
    """Train what is left to train, undisturbed; empty if that went well, and else what happened."""
    work = partial(train, cell.settings(folder / "run"))
    try:
        codes = wait(fork_ranks(cell.devices, folder, work), RESUME)
    except RuntimeError:
        return "hangs"
    if any(codes):
        told = [file.read_text()[-1000:] for file in sorted(folder.glob("rank-*.txt"))]
        return "\n".join((f"ends with {codes}", *told))
    return ""


def resume(cell: Cell, folder: Path, references: Path) -> str:
    """Start a training again; how it ends."""
    if told := train_to_end(cell, folder):
        return told
    end = Path("run", "end.ckpt")
    ours, theirs = folder / end, reference_folder(cell, references) / end
    if not theirs.exists():
        return "no undisturbed training to compare with"
    files = {
        file.relative_to(root)
        for root in (ours, theirs)
        for file in root.rglob("*.*")
        if file.parent != root
    }
    other = [str(file) for file in sorted(files) if differs(ours / file, theirs / file)]
    return f"differs in {', '.join(other)}" if other else "bit-equal"


def differs(ours: Path, theirs: Path) -> bool:
    if not (ours.exists() and theirs.exists()):
        return True
    return content(ours.parent, ours) != content(theirs.parent, theirs)


# -- all of them ------------------------------------------------------------------------------------------------------


def run_cells(cells: list[Cell], lanes: int, conditions: Conditions) -> list[Outcome]:
    """Run cells, so many at a time, and print each as it ends."""
    # What a first optimizer imports is imported before processes are forked, instead of in each of them.
    import_module("torch._dynamo")
    make_references(cells, conditions.references)
    # Numbers of cells, from which each lane takes the next.
    reads, writes = os.pipe()
    for index in range(len(cells)):
        os.write(writes, (index + 1).to_bytes(4, "little"))
    os.close(writes)
    forked = []
    for _ in range(lanes):
        process = os.fork()
        if not process:
            code = 1
            try:
                run_lane(cells, reads, conditions)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        forked.append(process)
    os.close(reads)
    for process in forked:
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError("the benchmark itself failed")
    return read_outcomes(conditions.lines)


def read_outcomes(lines: Path) -> list[Outcome]:
    """Read what cells have left; what is in shared memory no longer was another program's."""
    outcomes = [Outcome(**json.loads(line)) for line in lines.read_text().splitlines()]
    for outcome in outcomes:
        outcome.left = [
            one
            for one in outcome.left
            if not one.startswith("/dev/shm") or Path(one).exists()
        ]
        outcome.note("clean", not outcome.left)
    lines.write_text("".join(json.dumps(asdict(one)) + "\n" for one in outcomes))
    return outcomes


def run_lane(cells: list[Cell], reads: int, conditions: Conditions) -> None:
    """Run the cells whose numbers come out of a pipe."""
    lines = conditions.lines
    while number := int.from_bytes(os.read(reads, 4), "little"):
        cell = cells[number - 1]
        folder = conditions.folder / f"cell-{number}"
        outcome = run_cell(cell, folder, conditions)
        with lines.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(outcome, flush=True)
        if outcome.failed:
            # To be read by whoever looks for the reason.
            name = re.sub(r"[^A-Za-z0-9]+", "-", cell.name)
            shutil.copy(folder / "log", lines.with_name(f"{lines.stem}-{name}.log"))
        shutil.rmtree(folder)


def choose(part: str, only: str) -> list[Cell]:
    """The cells of a part (`"grid"`, `"sample"`, or `"all"`) whose name a pattern is found in."""
    cells = [
        *(grid() if part != "sample" else ()),
        *(sample() if part != "grid" else ()),
    ]
    return [cell for cell in cells if re.search(only, cell.name)]


def compare(
    part: str, only: str, lanes: int, hang_timeout: float, lines: Path | None
) -> list[Table]:
    """Run cells, and tell of them.

    Args:
        part: as for :func:`choose`.
        only: as for :func:`choose`.
        lanes: how many cells run at a time.
        hang_timeout: the Trainer's.
        lines: where outcomes go, as lines of JSON, and the output of cells that fall short; None for nowhere.
    """
    cells = choose(part, only)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = Path(name)
        conditions = Conditions(
            hang_timeout, folder, lines or folder / "outcomes.jsonl"
        )
        conditions.lines.unlink(missing_ok=True)
        began = time.monotonic()
        outcomes = {one.cell: one for one in run_cells(cells, lanes, conditions)}
        seconds = time.monotonic() - began
    found = [(cell, outcomes[cell.name]) for cell in cells]
    return [totals(found, hang_timeout, seconds), *details(found)]


def totals(
    found: list[tuple[Cell, Outcome]], hang_timeout: float, seconds: float
) -> Table:
    """How many cells hold, by what is asked of them."""
    groups: dict[str, list[Outcome]] = {}
    for cell, outcome in found:
        groups.setdefault(cell.group, []).append(outcome)
    if len(groups) > 1:
        groups["**all**"] = [outcome for _, outcome in found]
    rows = []
    for group, outcomes in groups.items():
        held = Counter(check for outcome in outcomes for check in outcome.held)
        asked = held + Counter(check for one in outcomes for check in one.failed)
        whole = sum(not outcome.failed for outcome in outcomes)
        counts = [
            f"{held[check]} of {asked[check]}" if asked[check] else "–"
            for check in CHECKS
        ]
        rows.append([group, f"{whole} of {len(outcomes)}", *counts])
    short = [outcome.cell for _, outcome in found if outcome.failed]
    limit = hang_timeout + GRACE
    notes = [
        f"**{len(found) - len(short)} of {len(found)} cells hold in all that is asked of them.** In time is within "
        f"{limit:g} s of the fault, with `hang_timeout={hang_timeout:g}`. It took {seconds / 60:.0f} minutes."
    ]
    if short:
        notes.append(f"Not: {'; '.join(short)}.")
    return Table(
        "Faults: how trainings end",
        ("", "holds", *CHECKS.values()),
        rows,
        {"cells": len(found), "short": len(short), "which": short},
        notes,
    )


def details(found: list[tuple[Cell, Outcome]]) -> Iterator[Table]:
    by_cell = dict(found)
    inside = {
        (cell.fault, cell.phase, cell.rank): outcome
        for cell, outcome in found
        if cell.group == GRID
    }
    if inside:
        faults = [fault for fault in FAULTS if any(fault == key[0] for key in inside)]
        rows: list[Sequence[str]] = [
            [fault, *(both_ranks(inside, fault, phase) for phase in PHASES)]
            for fault in faults
        ]
        reasons = sorted(
            {left_out(fault, phase, 0) for fault in FAULTS for phase in PHASES} - {""}
        )
        notes = [
            "Seconds from the fault until all processes were gone, in rank 0, in rank 1; in bold what does not hold. "
            f"–: left out, as {', or '.join(reasons)}. "
            "Under ddp, rank 0 alone writes checkpoints, and there is one agent.",
            "; ".join(f"*{phase}*: {words}" for phase, words in PHASES.items()) + ".",
        ]
        figures = {outcome.cell: asdict(outcome) for outcome in inside.values()}
        yield Table(
            "Faults by phase: two processes, ddp", ("", *PHASES), rows, figures, notes
        )
    others = [cell for cell in by_cell if cell.group != GRID]
    if others:
        rows = [
            [
                cell.name,
                in_words(by_cell[cell]),
                ", ".join(map(str, by_cell[cell].codes)),
            ]
            for cell in others
        ]
        figures = {cell.name: asdict(by_cell[cell]) for cell in others}
        header = ("", "ended after, s", "exit codes")
        yield Table(
            "Faults: other launchers, strategies and numbers of processes",
            header,
            rows,
            figures,
        )


def both_ranks(
    inside: dict[tuple[str, str, int], Outcome], fault: str, phase: str
) -> str:
    ends = [
        inside[fault, phase, rank] for rank in (0, 1) if (fault, phase, rank) in inside
    ]
    return ", ".join(map(in_words, ends)) or "–"


def in_words(outcome: Outcome) -> str:
    seconds = "hangs" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    failed = [
        check
        for check in outcome.failed
        if check != "ends" or outcome.seconds is not None
    ]
    words = " ".join((seconds, *failed))
    return f"**{words}**" if outcome.failed else words
