"""Running the program of an earlier run again, as its record says that it was started, to look at one of its steps."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from ...strategies.launch.machine import free_port
from ..checkpoint.find import find_manifests, resolve
from ..checkpoint.manifest import is_complete, read_manifest
from ..errors import CheckpointError
from .asked import Asked
from .black_box import ENVIRONMENT, FOLDER, box_path
from .files import RUN_FILE
from .packed import read_packed
from .secrets import HIDDEN

# Variables by which launchers tell a process of its job, of which these processes are none.
_LAUNCHERS = ("TORCHELASTIC_", "OMPI_COMM_", "PMI_", "SLURM_STEP_", "LOOPWRIGHT_AGENT")
_LAUNCHED = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOOPWRIGHT_ATTEMPT",
    "LOOPWRIGHT_BEATS",
    "LOOPWRIGHT_COMMAND",
    "LOOPWRIGHT_JOB",
    "LOOPWRIGHT_LAUNCH",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "RANK",
    "ROLE_RANK",
    "SLURM_PROCID",
    "WORLD_SIZE",
)
_DEVICES = "CUDA_VISIBLE_DEVICES"
# Once another rank has failed, the rank that is shown has so long to notice; then it is ended, too.
_PATIENCE_SECONDS = 20.0
_LOOK_SECONDS = 0.05
# What ends this command from outside.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
# A checkpoint may be complete so long after the record was written.
_WRITING_SECONDS = 60.0


class RerunError(RuntimeError):
    """A run cannot be repeated as asked; the message says why, and what to do."""


@dataclass(frozen=True)
class Recorded:
    """What a record tells of a run, as far as running it again needs it.

    Attributes:
        folder: the record's folder, absolute.
        document: ``run.json``.
        start: how its rank 0 began.
    """

    folder: str
    document: Mapping[str, Any]
    start: Mapping[str, Any]

    @classmethod
    def read(cls, path: str) -> Recorded:
        """Read the record of a run.

        Args:
            path: of the run's folder, of its record, or of a folder in which there is one run.

        Raises:
            RerunError: if there is none.
        """
        folder = find_record(path)
        with open(os.path.join(folder, RUN_FILE), encoding="utf-8") as file:
            document = json.load(file)
        try:
            start = read_packed(box_path(folder, "start", 0))
        except (OSError, ValueError) as error:
            raise RerunError(
                f"{folder}: {FOLDER}/start-0.json cannot be read ({error}): this run did not come to its first step, "
                "so there is nothing to repeat"
            ) from error
        return cls(folder, document, start)

    @property
    def world_size(self) -> int:
        """Number of its ranks."""
        return self.start["world_size"]

    def checkpoint_before(self, step: int) -> tuple[str | None, int]:
        """Return the newest complete checkpoint from which a step can be reached, and at which step that is.

        Raises:
            RerunError: if the step lies before what the run began with.
        """
        first = self.start["step"]
        if not first < step:
            raise RerunError(
                f"the run began at step {first}, from {self.start['checkpoint']}: step {step} is one of the run that "
                "has saved that"
            )
        attempts = self.document.get("attempts") or [{}]
        since = attempts[0].get("started", 0.0)
        until = self.document.get("written", math.inf) + _WRITING_SECONDS
        found: dict[str, int] = {}
        for path in self._checkpoints():
            with suppress(CheckpointError, OSError, KeyError):
                path = resolve(path)
                manifest = read_manifest(path)
                at = manifest["global_step"]
                is_whole = manifest.get("resumable", True) and is_complete(path)
                # Another run may have saved in the same folder.
                is_own = since <= manifest.get("created", since) <= until
                if first <= at < step and is_whole and is_own:
                    found[path] = at
        if found:
            nearest = max(found, key=lambda path: found[path])
            return nearest, found[nearest]
        begin = self.start["checkpoint"]
        if begin is not None and not is_complete(begin):
            raise RerunError(
                f"the run began with the checkpoint {begin}, which is not there any more, and none that it saved "
                f"itself before step {step} is left"
            )
        return begin, first

    def _checkpoints(self) -> Iterator[str]:
        """Give the checkpoints of the run: those that the record names, and those in the run's folder."""
        run = os.path.dirname(self.folder)
        here = self.start["command"]["folder"] or ""
        for entry in self.document.get("checkpoints") or ():
            path = entry["path"]
            yield path if "://" in path else os.path.join(here, path)
            # The folder may have been moved.
            yield os.path.join(run, "checkpoints", os.path.basename(path.rstrip("/")))
        yield from find_manifests(run)

    def command(self) -> list[str]:
        """Return how the program was started.

        Raises:
            RerunError: if it cannot be started in that way again.
        """
        command = self.start["command"]
        if command["folder"] is None:
            raise RerunError(
                "the run was one of a notebook, an interpreter or a test, which cannot be started again: give the "
                "program that does the same after --, as in -- python train.py"
            )
        program = [command["executable"], *command["orig_argv"][1:]]
        hidden = [word for word in program if HIDDEN in word]
        if hidden:
            raise RerunError(
                f"the record holds no secrets, and the command line had some ({' '.join(hidden)}): give all of it "
                "after --, as in -- python train.py --api_key …"
            )
        if not os.path.exists(program[0]):
            print(
                f"{program[0]} is not there any more: this runs under {sys.executable}",
                file=sys.stderr,
            )
            program[0] = sys.executable
        return program


def find_record(path: str) -> str:
    """Return the record's folder of the run at ``path``.

    Args:
        path: of a run's folder, of its record, of its ``run.json``, or of a folder with runs in it.

    Raises:
        RerunError: if there is none, or several.
    """
    if "://" in path:
        raise RerunError(f"copy the run's folder here first, with its record: {path}")
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.basename(path) == RUN_FILE:
        path = os.path.dirname(path)
    for folder in (path, os.path.join(path, "record")):
        if os.path.isfile(os.path.join(folder, RUN_FILE)):
            return folder
    runs = []
    for folder, names, files in os.walk(path):
        names.sort()
        if RUN_FILE in files and os.path.basename(folder) == "record":
            runs.append(os.path.dirname(folder))
    if len(runs) == 1:
        return os.path.join(runs[0], "record")
    if runs:
        shown = "\n  ".join(runs[-10:])
        raise RerunError(
            f"there are {len(runs)} runs in {path}: name one of them\n  {shown}"
        )
    raise RerunError(
        f"there is no record in {path}: name a run's log folder, which has record/{RUN_FILE} in it "
        "(Trainer(enable_record=True, logger=…))"
    )


def rerun(
    path: str,
    step: int,
    rank: int = 0,
    *,
    debugger: bool = False,
    detect_anomaly: bool = False,
    shows_batch: bool = False,
    trace: str = "",
    command: Sequence[str] = (),
    is_quiet: bool = False,
) -> int:
    """Run the program of a run again, up to a step and through it.

    Args:
        path: of the run's folder, or its record.
        step: the step with which ``global_step`` becomes this, from 1.
        rank: of whose part to tell.
        debugger: open pdb before the step, and where it raises.
        detect_anomaly: raise at the first loss or gradient that is not finite.
        shows_batch: print the samples of the step, and train nothing.
        trace: a file for what the modules compute in the step.
        command: how to start the program, if not as it was.
        is_quiet: print nothing of the step.

    Returns:
        The exit code of the process of ``rank``.

    Raises:
        RerunError: if it cannot be done; before anything is started.
    """
    recorded = Recorded.read(path)
    if step < 1:
        raise RerunError(f"--step must be an integer from 1; got {step}")
    if not 0 <= rank < recorded.world_size:
        raise RerunError(
            f"--rank must be from 0 to {recorded.world_size - 1}, the ranks of the run; got {rank}"
        )
    checkpoint, begin = recorded.checkpoint_before(step)
    with (
        _handling(_ENDING, _leave),
        tempfile.TemporaryDirectory(
            prefix="loopwright_replay_", ignore_cleanup_errors=True
        ) as scratch,
    ):
        request = Asked(
            record=recorded.folder,
            fit=recorded.start["fit"],
            world_size=recorded.world_size,
            rank=rank,
            step=step,
            checkpoint=checkpoint,
            begin=begin,
            scratch=scratch,
            shows_batch=shows_batch,
            debugger=debugger,
            detect_anomaly=detect_anomaly,
            trace=os.path.abspath(trace) if trace else "",
        )
        program = list(command) or recorded.command()
        folder = recorded.start["command"]["folder"]
        if not command and not os.path.isdir(folder):
            raise RerunError(
                f"the program's folder {folder} is not here: give the program after --, as in -- python train.py"
            )
        with open(os.devnull, "wb") as null:
            output = null.fileno() if is_quiet else 1
            return _run(recorded, replace(request, output=output), program)


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Let ``handler`` have these signals in the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _leave(number: int, frame: FrameType | None) -> None:
    """End this process as the signal would, but leave all blocks, so that they clean up."""
    raise SystemExit(128 + number)


def _run(recorded: Recorded, request: Asked, command: list[str]) -> int:
    """Start the ranks that are needed, and wait for the one that is looked at."""
    # To look at a batch, a rank needs no other.
    ranks = [request.rank] if request.shows_batch else range(request.world_size)
    port = free_port()
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in ranks:
            processes[rank] = _start(recorded, request, command, rank, port)
        code = _wait(processes, request)
    finally:
        _end(processes.values())
    if not code and not os.path.exists(request.begun):
        print(
            f"The program ended without its fit number {request.fit}: is it called as it was then?",
            file=sys.stderr,
        )
        return 1
    if code:
        _tell_of_others(processes, request)
    return code


def _variables(
    recorded: Recorded, request: Asked, rank: int, port: int
) -> dict[str, str]:
    """Return the environment of a rank."""
    # What numbers depend on is as it was then, or as unset as it was.
    left_out = {*_LAUNCHED, *ENVIRONMENT}
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith(_LAUNCHERS)
    }
    then = recorded.start["environment"]
    # Which devices there are is for whoever replays it to say.
    chosen = {_DEVICES: os.environ[_DEVICES]} if _DEVICES in os.environ else {}
    variables |= {**then, **chosen}
    # A program may begin a run at a tracker by itself.
    variables["WANDB_MODE"] = variables["COMET_MODE"] = "disabled"
    variables["MLFLOW_TRACKING_URI"] = f"file:{request.scratch}/mlflow"
    if request.world_size > 1:
        local = recorded.start["local_world_size"]
        variables |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(request.world_size),
            "LOCAL_RANK": str(rank % local),
            "LOCAL_WORLD_SIZE": str(local),
            "GROUP_RANK": str(rank // local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return variables


def _start(
    recorded: Recorded, request: Asked, command: list[str], rank: int, port: int
) -> subprocess.Popen[bytes]:
    """Start a rank; what the program prints is hidden until the step has come."""
    variables = _variables(recorded, request, rank, port)
    folder = recorded.start["command"]["folder"] or ""
    if not os.path.isdir(folder):
        folder = os.getcwd()
    with open(os.devnull, "r+b") as null:
        if rank != request.rank:
            with open(_errors_of(request, rank), "wb") as errors:
                variables |= request.variables()
                return subprocess.Popen(
                    command,
                    cwd=folder,
                    env=variables,
                    stdin=null,
                    stdout=null,
                    stderr=errors,
                    # Ctrl-C at a debugger's prompt is not for it.
                    start_new_session=True,
                )
        output = os.dup(request.output)
        try:
            variables |= replace(request, output=output).variables()
            return subprocess.Popen(
                command, cwd=folder, env=variables, stdout=null, pass_fds=(output,)
            )
        finally:
            os.close(output)


def _errors_of(request: Asked, rank: int) -> str:
    return os.path.join(request.scratch, f"stderr-{rank}")


def _wait(processes: Mapping[int, subprocess.Popen[bytes]], request: Asked) -> int:
    """Wait for the rank that is looked at; returns its exit code."""
    shown = processes[request.rank]
    deadline = None
    # Ctrl-C is for the program that is looked at, and its debugger.
    with _handling([signal.SIGINT], signal.SIG_IGN):
        while shown.poll() is None:
            time.sleep(_LOOK_SECONDS)
            has_failed = any(process.poll() for process in processes.values())
            if deadline is None and has_failed and not request.debugger:
                deadline = time.monotonic() + _PATIENCE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                break
    code = shown.poll()
    if code is None:
        return 1
    return 128 - code if code < 0 else code


def _end(processes: Any) -> None:
    """End what still runs."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _tell_of_others(
    processes: Mapping[int, subprocess.Popen[bytes]], request: Asked
) -> None:
    """Show what other ranks have said that failed."""
    for rank, process in processes.items():
        # Who was killed here has not failed.
        if rank == request.rank or not process.returncode or process.returncode < 0:
            continue
        with open(
            _errors_of(request, rank), encoding="utf-8", errors="replace"
        ) as file:
            text = file.read().rstrip()
        # One that merely lost a peer has nothing to add.
        if f"Rank {rank} of {request.world_size} lost its peers" not in text:
            print(f"\nrank {rank} failed, too:\n{text}", file=sys.stderr)
