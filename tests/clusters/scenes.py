"""Scenes on a cluster: each starts jobs in a folder of its own and looks at what came of them; nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "clusters"

# Each process of a scene has it in its environment, with the scene's own value.
MARK = "LOOPWRIGHT_SCENE"

PROGRAM = (sys.executable, "-m", "tests.clusters.program")


class CannotRunError(Exception):
    """Why a cluster cannot be run on this machine."""


@dataclass(frozen=True)
class Outcome:
    """What came of a scene.

    Attributes:
        cluster: where it was played.
        scene: its name.
        result: "passed", "failed" or "skipped".
        seconds: how long it took.
        note: why it was skipped, or how it failed.
    """

    cluster: str
    scene: str
    result: str
    seconds: float
    note: str = ""


class Stage:
    """A scene's folder, and what its jobs have written there.

    Args:
        folder: is made.
        mark: of the scene's processes; by default one of its own.
    """

    def __init__(self, folder: Path, mark: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        mark = mark or uuid.uuid4().hex
        self.environment = {
            **os.environ,
            MARK: mark,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder),
        }
        self.output = folder / "output"
        # Whether a job is over that should go on; a scheduler knows.
        self.has_ended: Callable[[], bool] = lambda: False

    def beside(self, name: str) -> Stage:
        """Another folder of this scene, inside of this one."""
        return Stage(self.folder / name, self.environment[MARK])

    def pause(self, seconds: float) -> None:
        """Let each step take so many seconds more from now on."""
        (self.folder / "pause").write_text(str(seconds))

    def start(
        self, *command: Any, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to the scene's, with further variables in its environment."""
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [*map(str, command)],
                env={**self.environment, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )

    def text(self) -> str:
        """All that the scene's jobs have printed."""
        if not self.output.exists():
            return ""
        return self.output.read_text(errors="replace")

    def steps(self) -> list[int]:
        """The steps that the main process has begun, in the order in which it did."""
        with suppress(FileNotFoundError):
            return [*map(int, (self.folder / "steps").read_text().split())]
        return []

    def wait_for_step(self, step: int, seconds: float = 150) -> None:
        """Wait until the main process begins a step."""
        wait_until(
            lambda: step in self.steps() or self.has_ended(),
            f"step {step} begins",
            seconds,
        )
        assert step in self.steps(), f"the job has ended before step {step}"

    def processes(self) -> list[int]:
        """The process ids of all that the scene has started, and that still runs."""
        return processes_with(MARK, self.environment[MARK])

    def rank(self, rank: int) -> int:
        """The process id of a rank."""
        return int((self.folder / f"rank.{rank}").read_text())

    def left_running(self) -> list[int]:
        """The scene's processes that have not ended within ten seconds; they are killed."""
        return end_processes_with(MARK, self.environment[MARK], 10)

    def check_whole(self) -> None:
        """Fail unless the weights, the losses and the curve are those of one machine with two processes."""
        expected = one_machine()
        assert self.weights() == expected.weights(), "other weights than on one machine"
        curve = self.curve()
        assert [step for step, _ in curve] == [step for step, _ in expected.curve()]
        assert curve == expected.curve(), "other losses than on one machine"

    def weights(self) -> bytes:
        """The trained weights, as the file that holds them."""
        path = self.folder / "weights.safetensors"
        assert path.exists(), "the training has not come to its end"
        return path.read_bytes()

    def curve(self) -> list[tuple[int, float]]:
        """The losses and their steps that TensorBoard shows, which must be those of one run."""
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        runs = [folder.name for folder in (self.folder / "logs").iterdir()]
        assert runs == ["version_0"], f"there are several curves: {runs}"
        events = EventAccumulator(str(self.folder / "logs" / "version_0"))
        return [(row.step, row.value) for row in events.Reload().Scalars("loss")]


def processes_with(variable: str, value: str) -> list[int]:
    """The ids of the processes that were started with an environment variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"{variable}={value}".encode() in variables:
                found.append(int(folder.name))
    return found


def end_processes_with(variable: str, value: str, seconds: float) -> list[int]:
    """Wait so long until such processes have ended; kill those that have not, and return their ids."""
    end = time.monotonic() + seconds
    while (left := processes_with(variable, value)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def wait_until(condition: Callable[[], Any], what: str, seconds: float) -> None:
    """Wait until a condition is true; fail when it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


@lru_cache(1)
def one_machine() -> Stage:
    """An undisturbed training in two processes of this machine, which all others are compared with."""
    stage = Stage(Path(tempfile.mkdtemp(prefix="loopwright_clusters_")) / "one_machine")
    status = stage.start(*PROGRAM, stage.folder, "--devices", 2).wait(120)
    assert status == 0, stage.text()
    return stage


def stop(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """End daemons, the last one first."""
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_root() -> None:
    """Refuse to go on without the rights that a cluster needs."""
    if os.geteuid() != 0:
        raise CannotRunError("needs root")


def install(commands: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's packages, unless their commands are there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    os.environ["PATH"] = path
    if all(shutil.which(command) for command in commands):
        return
    if shutil.which("apt-get") is None:
        raise CannotRunError(f"{', '.join(commands)} not found, and no apt-get")
    require_root()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ("apt-get", "-qq", "-y", "--no-install-recommends", "install", *packages)
    for command in (get, ("apt-get", "-qq", "update"), get):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode == 0 and command is get:
            return
    raise CannotRunError(f"cannot install {', '.join(packages)}: {done.stderr[-300:]}")


def play(
    name: str,
    cluster: Callable[[Path], AbstractContextManager[Any]],
    scenes: Sequence[Callable[[Any, Stage], None]],
    *only: str,
) -> list[Outcome]:
    """Play scenes on a cluster, one after the other, and print what came of each.

    Args:
        name: the cluster's.
        cluster: starts it, with a folder for its files, and stops it at the end.
        scenes: functions of the cluster and a stage, which raise where something is not as it should be.
        only: names of scenes, to play no others.
    """
    scenes = [scene for scene in scenes if not only or scene.__name__ in only]
    folder = Path(tempfile.mkdtemp(prefix="clusters_"))
    # Daemons are stopped when this program is asked to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    try:
        with ExitStack() as stack:
            started = stack.enter_context(cluster(folder))
            outcomes.append(_say(Outcome(name, "begin", "passed", _since(begin))))
            for scene in scenes:
                outcomes.append(_say(_play_one(name, started, scene, folder)))
    except CannotRunError as reason:
        outcomes.append(
            _say(Outcome(name, "all", "skipped", _since(begin), str(reason)))
        )
    except Exception as error:
        traceback.print_exc()
        outcomes.append(
            _say(Outcome(name, "begin", "failed", _since(begin), repr(error)))
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _play_one(
    name: str, cluster: Any, scene: Callable[[Any, Stage], None], folder: Path
) -> Outcome:
    title = scene.__name__.replace("_", " ")
    stage = Stage(folder / scene.__name__)
    begin = time.monotonic()
    note = ""
    try:
        scene(cluster, stage)
    except Exception as error:
        traceback.print_exc()
        print(f"\nWhat its jobs printed:\n{stage.text()[-6000:]}\n", flush=True)
        note = str(error) or type(error).__name__
    finally:
        left = stage.left_running()
    if left:
        note = f"{len(left)} processes were left; {note}"
    result = "failed" if note else "passed"
    return Outcome(name, title, result, _since(begin), note)


def _since(begin: float) -> float:
    return time.monotonic() - begin


def _say(outcome: Outcome) -> Outcome:
    print(
        f"{outcome.cluster}: {outcome.scene}: {outcome.result} in {outcome.seconds:.1f} s {outcome.note}",
        flush=True,
    )
    return outcome


def finish(outcomes: Sequence[Outcome]) -> int:
    """Print the table, remove what is left, and return the exit code."""
    if one_machine.cache_info().currsize:
        shutil.rmtree(one_machine().folder.parent, ignore_errors=True)
    print("\n| cluster | scene | result | seconds | |\n|---|---|---|---|---|")
    for row in outcomes:
        note = " ".join(row.note.split())[:160]
        print(
            f"| {row.cluster} | {row.scene} | {row.result} | {row.seconds:.1f} | {note} |"
        )
    counts = [
        sum(row.result == result for row in outcomes)
        for result in ("passed", "failed", "skipped")
    ]
    seconds = sum(row.seconds for row in outcomes)
    print(f"\nSeconds: {seconds:.0f}")
    print("{} passed, {} failed, {} skipped".format(*counts))
    return int(counts[1] > 0)
