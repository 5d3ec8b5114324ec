"""Starting the processes of a run and adopting those of a launcher: programs as users write and start them."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Module, Trainer
from loopwright.strategies import DDPStrategy
from loopwright.strategies.launch import failures, job_report, launcher, rank_report
from loopwright.strategies.launch.environment import (
    ClusterEnvironment,
    detect_environment,
    first_host,
)
from loopwright.strategies.launch.rank_report import RankReport
from loopwright.strategies.launch.watch import Beat
from tests.programs import show_stacks
from tests.samples import as_dataset

LIMIT = 100  # seconds for a program; only reached if it hangs
GRACE = 30  # seconds for processes to end that have lost the one that started them
MARK = "LOOPWRIGHT_TEST"  # the variable by which a test finds what descends from its programs
TORCHRUN = ("-m", "torch.distributed.run")

# What the programs have in common. With two processes, a step is over four samples.
DEFINITIONS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Module, Trainer


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.steps = 0

    def loss(self, batch):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


x = torch.arange(20.0).reshape(10, 2) / 20
data = TensorDataset(x, 3 * x.sum(1, keepdim=True))
module = Net()
"""

TRAINING = (
    """
import argparse
import atexit
import json
import os
import subprocess
import sys


def gloo_threads():
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            count += "gloo" in open(f"/proc/self/task/{task}/comm").read()
        except FileNotFoundError:  # this thread has just ended
            pass
    return count


@atexit.register
def note_the_end():
    if os.path.exists(file := os.path.join(arguments.out, f"{trainer.global_rank}.json")):
        with open(file) as text:
            told = json.load(text)
        with open(file, "w") as text:
            json.dump({**told, "at_the_end": gloo_threads()}, text)


if os.path.exists("runs"):
    os.chdir("runs")
"""
    + DEFINITIONS
    + """
parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--devices", default="auto")
parser.add_argument("--strategy", default="auto")
parser.add_argument("--num-nodes", default="auto", type=lambda text: text if text == "auto" else int(text))
parser.add_argument("--ask", action="store_true")
arguments = parser.parse_args()
trainer = Trainer(
    accelerator="cpu", devices=arguments.devices, strategy=arguments.strategy, num_nodes=arguments.num_nodes,
    max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
)
if os.path.exists("inner"):
    os.chdir("inner")
trainer.fit(module, DataLoader(data, 2), DataLoader(data, 3))
told = {
    "weights": module.layer.weight.flatten().tolist(),
    "val_loss": float(trainer.callback_metrics["val_loss"]),
    "world_size": trainer.world_size,
    "num_nodes": trainer.num_nodes,
    "best": os.path.exists(trainer.checkpoint_callback.best_model_path),
    "folder": os.getcwd(),
    "gloo_threads": gloo_threads(),
    "port": int(os.environ.get("MASTER_PORT", 0)),
    "again": Trainer(accelerator="cpu", logger=False).world_size,
    "flags": [sys._xoptions.get("mark"), sys.warnoptions],
}
if arguments.ask and trainer.global_rank == 1:
    alone = "from loopwright.framework import Trainer; print(Trainer(accelerator='cpu', logger=False).world_size)"
    told["alone"] = int(subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True).stdout)
with open(os.path.join(arguments.out, f"{trainer.global_rank}.json"), "w") as file:
    json.dump(told, file)
"""
)

FAILING = (
    """
import atexit
import os
import signal
import sys
import time
from datetime import timedelta

from loopwright.strategies import DDPStrategy
"""
    + DEFINITIONS
    + """
way = sys.argv[1]
atexit.register(lambda: os.write(1, f"leaving {os.environ.get('RANK')}\\n".encode()))


class Failing(Net):
    def setup(self, stage):
        if way == "terminated early" and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def fail(self):
        if way == "raise" or (way == "once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
            raise ValueError("a bad sample")
        if way == "own socket":
            raise RuntimeError("the data server's socket timed out")
        if way == "kill late":
            time.sleep(2.5)  # the watch looks once a second
        if way.startswith("kill") or way == "terminate":
            os.kill(os.getpid(), signal.SIGTERM if way == "terminate" else signal.SIGKILL)
        if way.startswith("exit"):
            sys.exit(int(way[-1]))
        if way.startswith("hang"):
            signal.signal(signal.SIGTERM, signal.SIG_DFL if way == "hang deaf" else signal.getsignal(signal.SIGTERM))
            time.sleep(1000)

    def training_step(self, batch, batch_idx):
        if way == "endless" and self.global_step == 3:
            os.write(1, f"training {self.global_rank} {os.getpid()}\\n".encode())  # at once, as both write to one pipe
        if self.current_epoch == 1 and batch_idx == 2:
            if self.global_rank == 1:
                self.fail()
        return super().training_step(batch, batch_idx)


timeout = timedelta(seconds=5 if way.startswith("hang") else 60)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timeout, max_restarts=int(way == "once")),
    max_epochs=-1 if way == "endless" else 2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Failing(), DataLoader(data, 1))
print("trained", trainer.global_step)
"""
)


def losses(weight: Tensor, bias: Tensor, rows: slice) -> Tensor:
    """The squared errors of DEFINITIONS' module on some of its data."""
    x = torch.arange(20.0).reshape(10, 2)[rows] / 20
    return (nn.functional.linear(x, weight, bias) - 3 * x.sum(1, keepdim=True)).square()


def expected(epochs: int) -> tuple[Tensor, float]:
    """What torch alone comes to: the weights after so many epochs of steps over four samples, and the loss."""
    weight, bias = (
        torch.ones(1, 2, requires_grad=True),
        torch.zeros(1, requires_grad=True),
    )
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    for _ in range(epochs):
        for start in (0, 4, 8):
            optimizer.zero_grad()
            losses(weight, bias, slice(start, min(start + 4, 10))).mean().backward()
            optimizer.step()
    return weight.detach().flatten(), losses(weight, bias, slice(None)).mean().item()


def assert_trained(weights: Any, val_loss: float, epochs: int = 2) -> None:
    """The weights and metrics are those that training gives."""
    wanted, loss = expected(epochs)
    torch.testing.assert_close(torch.tensor(weights), wanted)
    assert val_loss == pytest.approx(loss, rel=1e-5)


# -- running programs -------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """What has come of a program."""

    code: int
    out: str
    err: str


class Programs:
    """Starts programs in an environment of their own, and finds all processes that descend from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, **variables: str) -> dict[str, str]:
        """What they find in their environment."""
        return {
            **os.environ,
            "TMPDIR": str(self.temporary),
            MARK: self.mark,
            **variables,
        }

    def start(
        self,
        *command: Any,
        prefix: tuple[str, ...] = (),
        cwd: Path | None = None,
        **variables: Any,
    ) -> Any:
        """Start ``python *command``."""
        program = subprocess.Popen(
            [*prefix, sys.executable, *map(str, command)],
            cwd=cwd or self.folder,
            env=self.environment(**variables),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(program)
        return program

    def end(self, program: subprocess.Popen[str], stdin: str | None = None) -> Ended:
        """Wait for a program, and for all that write to its output."""
        try:
            out, err = program.communicate(stdin, LIMIT)
        except subprocess.TimeoutExpired:
            show_stacks(self.living())
            self.kill()
            out, err = program.communicate()
            pytest.fail(f"{program.args} did not end within {LIMIT} s\n{out}\n{err}")
        return Ended(program.returncode, out, err)

    def run(self, *command: Any, stdin: str | None = None, **options: Any) -> Ended:
        """Run ``python *command`` to its end."""
        return self.end(self.start(*command, **options), stdin)

    def living(self) -> list[int]:
        """The processes that inherited this test's mark, and are more than zombies, which have no environment."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
            except OSError:  # it has just ended
                continue
        return found

    def leftovers(self) -> list[str]:
        """Temporary folders of ours and of torchelastic's."""
        return [
            path.name
            for path in self.temporary.iterdir()
            if path.name.startswith(("loopwright", "torchelastic"))
        ]

    def kill(self) -> None:
        for process in self.living():
            os.kill(process, signal.SIGKILL)


def ends(process: int, seconds: float = GRACE) -> bool:
    """Wait for a process that need not be our child."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


@contextmanager
def running_in(folder: Path) -> Iterator[Programs]:
    """Run programs; fail if one of their processes is left, or one of their temporary files."""
    programs = Programs(folder)
    try:
        yield programs
        left = [process for process in programs.living() if not ends(process, 2)]
        assert not left, f"processes {left} were left behind"
    finally:
        programs.kill()
        for program in programs.started:
            program.communicate()


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with running_in(tmp_path) as programs:
        yield programs


def results(folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What TRAINING has written, by rank."""
    assert sorted(file.name for file in folder.glob("*.json")) == [
        f"{rank}.json" for rank in range(ranks)
    ]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def free_port(low: int = 0, high: int = 65536) -> int:
    """A port on which nothing listens now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0 if low == 0 else low + uuid.uuid4().int % (high - low)))
            return probe.getsockname()[1]


# -- scripts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_script(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A script's results. It goes elsewhere before it imports Loopwright, and once more before it trains."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "runs" / "inner").mkdir(parents=True)
    (folder / "programs").mkdir()
    (folder / "programs" / "train.py").write_text(TRAINING)
    with running_in(folder) as programs:
        command = (
            "-X",
            "mark",
            "-W",
            "ignore",
            "programs/train.py",
            folder,
            "--devices",
            2,
            "--strategy",
            "ddp",
            "--ask",
        )
        ended = programs.run(*command)
        assert ended.code == 0, ended.err
        assert (
            ended.err.count(
                "Training on cpu (strategy ddp, 2 processes launched by this program)"
            )
            == 1
        )
        assert not programs.leftovers()
    found = results(folder)
    assert [result.pop("folder") for result in found] == [
        str(folder / "runs" / "inner")
    ] * 2
    return found


def test_a_script_runs_again_in_each_process(by_script: list[dict[str, Any]]) -> None:
    for result in by_script:
        assert_trained(result["weights"], result["val_loss"])
        assert (result["world_size"], result["num_nodes"], result["best"]) == (
            2,
            1,
            True,
        )
        assert result["flags"] == [True, ["ignore"]]
        # Threads that live on abort the process now and then, as its interpreter ends.
        assert result["gloo_threads"] > result["at_the_end"] == 0
        # Another program's connection may have been given any other port by now.
        assert 20_000 <= result["port"] < 32_000
    assert (
        by_script[1]["alone"] == 1
    )  # what a rank starts for something else is none of its peers
    assert by_script[0]["weights"] == by_script[1]["weights"]


def test_the_same_script_under_torchrun(
    by_script: list[dict[str, Any]], programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    ended = programs.run(
        *TORCHRUN, "--standalone", "--nproc-per-node", 2, "train.py", tmp_path
    )
    assert ended.code == 0, ended.err
    assert "2 processes launched by torchrun" in ended.err
    for own, other in zip(results(tmp_path), by_script, strict=True):
        for key in ("weights", "val_loss", "world_size", "num_nodes", "best"):
            assert own[key] == other[key], key


def test_a_module_of_a_package(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "training.py").write_text(
        "from . import name\nassert name\n" + TRAINING
    )
    (tmp_path / "package" / "__init__.py").write_text("name = 'package'\n")
    (tmp_path / "runs").mkdir()
    ended = programs.run("-m", "package.training", tmp_path, "--devices", 2)
    assert ended.code == 0, ended.err
    for result in results(tmp_path):
        assert_trained(result["weights"], result["val_loss"])
        assert result["folder"] == str(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["standard input", "-c"])
def test_without_a_script_the_run_comes_back(
    way: str, programs: Programs, tmp_path: Path
) -> None:
    command, stdin = ("-", TRAINING) if way == "standard input" else ("-c", None)
    code = () if stdin else (TRAINING,)
    ended = programs.run(command, *code, tmp_path, "--devices", 2, stdin=stdin)
    assert ended.code == 0, ended.err
    assert "2 processes launched by this program" in ended.err
    (result,) = results(tmp_path, ranks=1)  # what follows fit runs here, and once
    assert_trained(result["weights"], result["val_loss"])
    assert result["best"]


# -- notebooks, tests -------------------------------------------------------------------------------------------------

NOTEBOOK = [
    DEFINITIONS
    + """
import json
import os

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.loggers import CSVLogger


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(data)

    def __getitem__(self, index):
        return data[index]


class Cell(Net):
    fails_at = -1

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == self.fails_at:
            raise ValueError("a bad sample")
        return super().training_step(batch, batch_idx)


torch.set_num_threads(2)
torch.ones(700, 700) @ torch.ones(700, 700)  # OpenMP's threads are there: a fork would hang
module, losses = Cell(), Losses()
trainer = Trainer(
    accelerator="cpu", devices=2, max_epochs=2, logger=CSVLogger("."), callbacks=[losses, ModelCheckpoint()],
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(data, 2), DataLoader(data, 3))


def tell():
    print(json.dumps({
        "weights": module.layer.weight.flatten().tolist(),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "progress": (trainer.global_step, trainer.current_epoch, module.steps, len(losses.seen)),
        "log_dir": trainer.logger.log_dir,
        "files": sorted(os.listdir(trainer.logger.log_dir)),
        "best": os.path.exists(trainer.checkpoint_callback.best_model_path),
    }))


tell()
""",
    """
trainer.max_epochs = 3
trainer.fit(module, DataLoader(Rows(), 2, num_workers=1), DataLoader(data, 3))
tell()
""",
    """
predictions = torch.cat(trainer.predict(module, DataLoader(data, 2)))
torch.testing.assert_close(predictions, module.layer(x).detach())
""",
    """
module.fails_at, trainer.max_epochs = 10, 5
trainer.fit(module, DataLoader(data, 2))
""",
]


@pytest.mark.slow
def test_a_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    with running_in(tmp_path) as programs:
        environment = programs.environment(IPYTHONDIR=str(tmp_path / "ipython"))
        for name in (
            "OMP_NUM_THREADS",
            "PYTEST_CURRENT_TEST",
        ):  # ipykernel treats tests differently
            environment.pop(name)
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK]
        )
        options: Any = {
            "timeout": LIMIT,
            "kernel_name": "python3",
            "resources": {"metadata": {"path": str(tmp_path)}},
        }
        NotebookClient(notebook, allow_errors=True, **options).execute(env=environment)

    outputs = [
        [output for output in cell.outputs if output.output_type != "stream"]
        for cell in notebook.cells
    ]
    assert outputs[:3] == [[], [], []]  # no errors
    texts = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
    ]
    assert "2 processes launched by this program" in texts[0]
    first, second = (
        json.loads(re.findall(r'^\{"weights.*\}$', text, re.MULTILINE)[-1])
        for text in texts[:2]
    )
    assert_trained(first["weights"], first["val_loss"])
    assert first["progress"] == [6, 2, 6, 6]
    assert "metrics.csv" in first["files"]
    assert first["best"]

    # The second fit goes on: with what the module and the callback had gathered, in the same folder.
    assert_trained(second["weights"], second["val_loss"], epochs=3)
    assert second["progress"] == [9, 3, 9, 9]
    assert second["log_dir"] == first["log_dir"]

    # With the line of the cell, which is in no file.
    (error,) = outputs[3]
    assert (error.ename, error.evalue) == ("ValueError", "a bad sample")
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    assert in_order(
        text, "Rank 1 of 2 failed at epoch 3, batch 1, global step 10, in training_step", "in training_step",
        'raise ValueError("a bad sample")', "direct cause", "ValueError: a bad sample",
    )  # fmt: skip


class Here(Module):
    """What the processes import from this file."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def loss(self, batch: Any) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_in_a_test_of_pytest() -> None:
    x = torch.arange(20.0).reshape(10, 2) / 20
    data = TensorDataset(x, 3 * x.sum(1, keepdim=True))

    class Rows(Dataset):  # which no other process can import
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            return data[index]

    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Here()
    weight = module.layer.weight
    trainer.fit(module, DataLoader(Rows(), 2, num_workers=1))
    (values,) = trainer.validate(module, DataLoader(data, 3), verbose=False)
    assert_trained(
        weight.flatten().tolist(), values["val_loss"]
    )  # in place: who holds a parameter sees it trained
    assert (trainer.global_step, trainer.state.status) == (6, "finished")


# -- failing ----------------------------------------------------------------------------------------------------------


def in_order(text: str, *parts: str) -> bool:
    """Whether the text has these parts, each after the one before."""
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("way", "code", "parts"),
    [
        (
            "raise",
            1,
            (
                "Rank 1 of 2 failed at epoch 1, batch 2, global step 7, in training_step of Failing:\n",
                "in fail",
                "ValueError: a bad sample\n\n",
                "Rank 0 of 2 lost its peers at epoch 1, batch 2, global step 7",
            ),
        ),
        (
            "own socket",
            1,
            ("in fail", "RuntimeError: the data server's socket timed out"),
        ),
        (
            "kill",
            137,
            (
                "Rank 1 of 2 ended with SIGKILL, last seen at ",
                "Rank 0 of 2 lost its peers at epoch 1, batch 2",
            ),
        ),
        ("terminate", 143, ("SIGTERM at step", "of 2 ended by SIGTERM, as asked")),
        # Before the run has begun to look for signals.
        (
            "terminated early",
            143,
            ("Rank 1 of 2 ended with SIGTERM", "Rank 0 of 2 lost its peers"),
        ),
        (
            "exit 0",
            1,
            (
                "Rank 1 of 2 ended with exit code 0 before the run was over at epoch 1, batch 2",
                "SystemExit: 0",
                "Rank 0 of 2 lost its peers",
            ),
        ),
        (
            "hang",
            124,
            (
                "Rank 1 of 2 was still running when it was stopped at epoch 1, batch 2,",
                "in training_step of Failing:",
                "time.sleep(1000)",
                "Rank 0 of 2 lost its peers at epoch 1, batch 2",
            ),
        ),
        pytest.param(
            "hang deaf",
            124,
            (
                "Rank 1 of 2 was still running when it was stopped",
                "Rank 0 of 2 lost its peers at epoch 1, batch 2",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails(
    way: str, code: int, parts: tuple[str, ...], programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(FAILING)
    ended = programs.run("train.py", way)
    assert in_order(ended.err, *parts), ended.err
    assert ended.err.count("Traceback") == (
        0 if way.startswith(("kill", "terminate", "hang")) else 1
    ), ended.err
    assert ended.code == code
    assert "trained" not in ended.out
    leaves = not way.startswith(("kill", "hang", "terminated"))
    assert ("leaving 1" in ended.out) == leaves
    assert not programs.leftovers()
    if way == "terminate":
        # It has ended as it was asked to, and nothing has failed.
        assert not (tmp_path / "failure.json").exists()
        return
    told = json.loads((tmp_path / "failure.json").read_text())
    assert (told["rank"], told["world_size"], told["exit_code"]) == (1, 2, code)
    assert ended.err.startswith(
        told["summary"].partition(": ")[0], ended.err.index("Rank ")
    )
    kinds = {
        "kill": "ended",
        "terminated early": "ended",
        "exit 0": "ended",
        "hang": "stopped",
        "hang deaf": "stopped",
    }
    guilty, other = (rank["kind"] for rank in told["ranks"])
    assert guilty == kinds.get(way, "failed")
    assert other in ("lost", "stopped")
    text = (tmp_path / "failure.txt").read_text()
    # What is left out on the terminal is there, and the tracebacks of the others; who was stopped has stacks.
    assert text.count("Traceback") == ended.err.count("Traceback") + (other == "lost")
    assert str(tmp_path / "failure.txt") in ended.err


def test_the_order_of_guilt(tmp_path: Path) -> None:
    """Who is to blame is told first and whole, the others in a line each."""

    def failed(
        processes: int, codes: dict[int, int], *reports: Any, **more: Any
    ) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for report in reports:
            file = folder / "job" / "attempt_0" / str(report.rank) / "error.json"
            rank_report.write_report(str(file), report)
        if (rank := more.pop("last_seen", None)) is not None:
            folder.mkdir()
            beat = Beat(1, 7, rank, processes, 0, "train", "epoch 2", 9.0, "", "")
            with (folder / "beat-7-7").open("w") as beats:
                beat.write(beats.fileno())
        failures = {
            rank: SimpleNamespace(exitcode=code, timestamp=9, pid=7)
            for rank, code in codes.items()
        }
        job = job_report.failure_text(failures, str(folder), processes, **more)
        return job.text.splitlines(), job.exit_code

    def told(rank: int, kind: Any, **more: Any) -> Any:
        stack = f"stack of {rank}"
        values = {"time": rank, **more}
        return RankReport(rank, kind, "step 3", f"why {rank}", stack, **values)

    lost = "Rank 0 of 3 lost its peers at step 3: why 0"
    # One ended as if all were well, one was stopped, one has waited in vain.
    assert failed(3, {0: 1, 2: -15}, told(0, "lost"), told(2, "stopped")) == (
        [
            "Rank 1 of 3 ended with exit code 0 before the run was over",
            "",
            "Rank 2 of 3 lost its peers at step 3: why 2",
            lost,
        ],
        1,
    )
    # One hangs where no handler of signals runs.
    assert failed(3, {0: 1, 1: -15, 2: 1}, told(0, "lost"), told(2, "lost")) == (
        [
            "Rank 1 of 3 was still running when it was stopped",
            "",
            lost,
            "Rank 2 of 3 lost its peers at step 3: why 2",
        ],
        124,
    )
    # One has left by sys.exit(3), and was ended before the interpreter was; another one failed later.
    exited = told(2, "failed", exit_code=3, time=0.5)
    assert failed(
        3, {0: 1, 1: 1, 2: -15}, told(0, "lost"), told(1, "failed"), exited
    ) == (
        [
            "Rank 2 of 3 failed at step 3:",
            "stack of 2",
            "",
            "Rank 1 of 3 failed at step 3: why 1",
            lost,
        ],
        3,
    )
    # One was ended from outside, the other one by the agent.
    assert failed(2, {0: -15, 1: -15}) == (
        [
            "Rank 0 of 2 ended with SIGTERM",
            "",
            "Rank 1 of 2 lost its peers",
        ],
        143,
    )
    # Many ranks that have ended alike share a line.
    lines, _ = failed(
        64,
        {9: 1},
        told(9, "failed"),
        *(told(i, "lost") for i in range(9)),
        *(told(i, "lost") for i in range(10, 64)),
    )
    assert lines[3:] == [
        "Rank 0 of 64 lost its peers at step 3: why 0 (so did 62 more)"
    ]
    # Where a process was that was killed is known from its last sign of life.
    assert failed(2, {1: -9}, last_seen=1) == (
        ["Rank 1 of 2 ended with SIGKILL, last seen at epoch 2"],
        137,
    )
    # Only who watches from outside knows.
    hung = RankReport(1, "hung", "step 2", "it has not moved for 9 s", "stack of 1")
    assert failed(3, {0: 1, 1: -9, 2: -15}, told(0, "lost"), hung) == (
        [
            "Rank 1 of 3 did not answer at step 2: it has not moved for 9 s:",
            "stack of 1",
            "",
            "Rank 2 of 3 lost its peers",
            lost,
        ],
        124,
    )


class Odd(Exception):
    """Its constructor cannot be called with what it keeps."""

    def __init__(self, *, reason: str) -> None:
        super().__init__("odd", reason)
        self.reason, self.lock = reason, threading.Lock()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("x"), (KeyError, ("x",))),
        (OSError(2, "gone", "file"), (FileNotFoundError, (2, "gone"))),
        (Odd(reason="why"), (Odd, ("odd", "why"))),
        (ValueError(threading.Lock()), (ValueError, None)),
        (KeyboardInterrupt(), (KeyboardInterrupt, ())),
        (SystemExit(3), (SystemExit, (3,))),
        (SystemExit(0), None),  # nobody would see that the run has not come to its end
        (
            RuntimeError("gloo: connection closed by peer"),
            None,
        ),  # the reports tell who has ended
    ],
    ids=[
        "plain",
        "of the system",
        "odd constructor",
        "no pickle",
        "interrupt",
        "exit 3",
        "exit 0",
        "a lost peer",
    ],
)
def test_an_exception_comes_back_as_itself(
    error: BaseException, expected: Any, tmp_path: Path
) -> None:
    with suppress(Exception):
        launcher._save_error(error, str(tmp_path / "error"))
    found: Any = launcher._load_error(str(tmp_path / "error"))
    if expected is None:
        assert found is None
        return
    assert type(found) is expected[0]
    assert found.args == (expected[1] if expected[1] is not None else (str(error),))
    assert getattr(found, "reason", None) == getattr(error, "reason", None)


def test_an_error_that_a_program_survives_is_not_the_one_that_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    failures.record_failure(RuntimeError("gloo: connection closed by peer"))
    assert json.loads(file.read_text())["report"]["kind"] == "lost"

    class Echo(Module):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return batch

    Trainer(accelerator="cpu", barebones=True).predict(
        Echo(), DataLoader(as_dataset(torch.ones(2)))
    )
    assert not file.exists()


def test_a_rank_that_fails_once(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FAILING)
    ended = programs.run("train.py", "once")
    assert ended.code == 0, ended.err
    assert ended.out.count("trained") == 2


def workers_of(program: Any) -> dict[str, int]:
    """The processes of FAILING, by rank, when both are training."""
    workers: dict[str, int] = {}
    for line in program.stdout:
        workers.update(
            (rank, int(process))
            for rank, process in re.findall(r"training (\d) (\d+)\n", line)
        )
        if len(workers) == 2:
            break
    assert len(workers) == 2, program.stderr.read()
    return workers


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_a_signal_ends_all_processes(
    number: int, code: int, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(FAILING)
    program = programs.start("train.py", "endless")
    workers = workers_of(program)
    program.send_signal(number)
    assert programs.end(program).code == code
    assert all(map(ends, workers.values()))


def test_processes_do_not_outlive_an_agent_of_the_users(
    programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(FAILING)
    program = programs.start(
        *TORCHRUN, "--standalone", "--nproc-per-node", 2, "train.py", "endless"
    )
    workers = workers_of(program)
    program.kill()
    assert programs.end(program).code == -signal.SIGKILL
    assert all(map(ends, workers.values()))


# -- launchers --------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "41237",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-007,012],login1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHELASTIC = {
    "RANK": "3",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "2345",
    "TORCHELASTIC_RUN_ID": "x",
}
PYTORCHJOB = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "MASTER_ADDR": "node0",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.fixture
def launched_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets a launcher's variables."""

    def launched_by(variables: dict[str, str], **more: str) -> None:
        for name, value in {**variables, **more}.items():
            monkeypatch.setenv(name, value)

    return launched_by


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (
            TORCHELASTIC,
            ClusterEnvironment("torchrun", 3, 6, 1, 2, 1, "node0", 2345, elastic=True),
        ),
        (
            SLURM,
            ClusterEnvironment(
                "SLURM's srun", 3, 4, 1, 2, 1, "gpu003", 15000 + 41239 % 10000
            ),
        ),
        (
            {**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            ClusterEnvironment("SLURM's srun", 3, 4, 1, 2, 1, "a", 7),
        ),
        (OPEN_MPI, ClusterEnvironment("MPI", 5, 8, 1, 4, 1, "node0", 29500)),
        (PMI, ClusterEnvironment("MPI", 1, 2, 1, 2, 0, "127.0.0.1", 29500)),
        (
            PYTORCHJOB,
            ClusterEnvironment(
                "the environment (RANK, WORLD_SIZE)",
                1,
                3,
                0,
                1,
                1,
                "job-master-0",
                23456,
            ),
        ),
        # srun may start torchrun, which then is the one to believe.
        (
            {**SLURM, **TORCHELASTIC},
            ClusterEnvironment("torchrun", 3, 6, 1, 2, 1, "node0", 2345, elastic=True),
        ),
    ],
    ids=[
        "torchrun",
        "srun",
        "srun with an address",
        "Open MPI",
        "PMI",
        "PyTorchJob",
        "srun of torchrun",
    ],
)
def test_a_launcher_is_recognised(
    variables: dict[str, str],
    place: ClusterEnvironment,
    launched_by: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched_by(variables)
    assert detect_environment() == place
    assert place.num_nodes == {
        "torchrun": 3,
        "the environment (RANK, WORLD_SIZE)": 3,
    }.get(place.launcher, 1 if variables is PMI else 2)
    monkeypatch.setenv("LOOPWRIGHT_LAUNCH", "off")
    assert detect_environment() is None


@pytest.mark.parametrize(
    "variables",
    [
        {
            name: value
            for name, value in SLURM.items()
            if name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST")
        }
        | {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        },
        {
            **SLURM,
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1",
            "SLURM_PROCID": "0",
        },
        {
            "PMI_RANK": "0",
            "PMI_SIZE": "1",
            "MPI_LOCALRANKID": "0",
            "MPI_LOCALNRANKS": "1",
        },
        {"RANK": "0", "WORLD_SIZE": "2"},
    ],
    ids=[
        "a batch script without srun",
        "srun of one task",
        "mpirun of one",
        "RANK without an address",
    ],
)
def test_no_launcher_is_imagined(variables: dict[str, str], launched_by: Any) -> None:
    launched_by(variables, SLURM_NODEID="0")
    assert detect_environment() is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,012],login1", "gpu003"),
        ("login1,gpu[003-007]", "login1"),
        ("node7", "node7"),
        ("rack[2,4]-ib", "rack2-ib"),
        ("rack[1-2]n[04-08],x", "rack1n04"),
    ],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("name", ["SLURM_STEP_NODELIST", "SLURM_LOCALID"])
def test_a_variable_that_slurm_has_not_set_is_named(
    name: str, launched_by: Any
) -> None:
    launched_by({key: value for key, value in SLURM.items() if key != name})
    with pytest.raises(
        ValueError, match=f"SLURM's srun has started this process, and {name} is not"
    ):
        detect_environment()


def trains_at_the_second_start(folder: str) -> tuple[int, int]:
    """Runs as in a notebook, whose processes die once."""

    class Dies(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if is_first and trainer.current_epoch == 2:
                # The main process alone writes, and would be told to end while it does.
                trainer.engine.saver.wait()
                trainer.strategy.barrier()
                raise RuntimeError("the first time")

    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.epochs: list[int] = []

        def on_train_epoch_start(self) -> None:
            self.epochs.append(self.current_epoch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Net()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(max_restarts=1), max_epochs=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Dies(), ModelCheckpoint(folder)],
    )  # fmt: skip
    trainer.fit(module, [torch.ones(2, 2)] * 2, ckpt_path="last")
    return trainer.global_step, module.epochs[0]


@pytest.mark.slow
def test_a_notebooks_processes_are_started_again(tmp_path: Path) -> None:
    """As those of a script, ``max_restarts`` times; the run goes on."""
    assert trains_at_the_second_start(str(tmp_path / "saved")) == (3, 2)


def test_mpi_over_machines_needs_an_address(launched_by: Any) -> None:
    launched_by(
        {name: value for name, value in OPEN_MPI.items() if name != "MASTER_ADDR"}
    )
    with pytest.raises(
        ValueError,
        match=r"8 processes, 4 of them on this machine, and MASTER_ADDR is not set",
    ):
        detect_environment()


@pytest.mark.parametrize(
    ("variables", "arguments", "words"),
    [
        (TORCHELASTIC, {"devices": 3}, ["devices asks for 3", "torchrun started 2 "]),
        (PYTORCHJOB, {"devices": 2}, ["devices asks for 2", "started 1 "]),
        (
            {
                **SLURM,
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
            },
            {"num_nodes": 2},
            ["num_nodes asks for 2", "srun started 3 machines"],
        ),
        (
            TORCHELASTIC,
            {"strategy": "single", "devices": 2},
            ["single", "one process", "devices=2, num_nodes=3"],
        ),
        (
            TORCHELASTIC,
            {"devices": 1, "num_nodes": 3},
            ["devices asks for 1", "torchrun started 2"],
        ),
        (
            {},
            {"num_nodes": 2, "devices": 4},
            ["num_nodes=2", "torchrun --nnodes 2 --nproc-per-node 4", "srun"],
        ),
    ],
    ids=[
        "devices",
        "devices of PyTorchJob",
        "nodes",
        "single",
        "one device of each",
        "no launcher",
    ],
)
def test_what_contradicts_the_launcher_is_refused(
    variables: dict[str, str],
    arguments: dict[str, Any],
    words: list[str],
    launched_by: Any,
) -> None:
    launched_by(variables)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        Trainer(accelerator="cpu", logger=False, **arguments)


@pytest.mark.parametrize(
    ("variables", "arguments", "alone"),
    [
        (TORCHELASTIC, {"devices": 1}, True),
        (TORCHELASTIC, {"devices": "1", "num_nodes": 1}, True),
        (TORCHELASTIC, {"strategy": "single"}, True),
        (PYTORCHJOB, {"devices": 1, "num_nodes": 1}, True),
        (PYTORCHJOB, {"strategy": "single"}, True),
        (PYTORCHJOB, {"devices": 1}, False),  # one on each machine
        (PYTORCHJOB, {"devices": 1, "num_nodes": 3}, False),
        (TORCHELASTIC, {}, False),
    ],
)
def test_one_device_of_a_launched_program_is_used_alone(
    variables: dict[str, str], arguments: dict[str, Any], alone: bool, launched_by: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        failures._worker, "has_joined", True
    )  # or the hook for uncaught exceptions would be put in here
    for rank in ("0", "1"):
        launched_by(variables, RANK=rank)
        trainer = Trainer(accelerator="cpu", logger=False, **arguments)
        assert trainer.world_size == (1 if alone else int(variables["WORLD_SIZE"]))
        assert trainer.is_global_zero == (alone or rank == "0")
        shown = [
            callback
            for callback in trainer.callbacks
            if "Bar" in type(callback).__name__
        ]
        assert len(shown) == (0 if alone and rank == "1" else 1)
    said = f"started {variables['WORLD_SIZE']} processes: each of them runs all of it by itself"
    assert caplog.text.count(said) == int(alone)


def test_the_only_process_of_a_launcher_is_told_nothing(
    launched_by: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failures._worker, "has_joined", True)  # as above
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
    }
    launched_by({**TORCHELASTIC, **alone})
    assert Trainer(accelerator="cpu", logger=False, strategy="single").world_size == 1
    assert "by itself" not in caplog.text


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_processes_of_a_launcher_train_together(
    launcher: str, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    port = free_port(15000, 25000)
    size, local = ("2", "2") if launcher == "mpirun" else ("2", "2(x1)")
    started = []
    for rank in ("0", "1"):
        slurm: dict[str, Any] = {
            **SLURM, "SLURM_JOB_ID": str(port - 15000), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": size,
            "SLURM_STEP_TASKS_PER_NODE": local, "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank, "SLURM_NODEID": "0",
        }  # fmt: skip
        mpi: dict[str, Any] = {
            "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "OMPI_COMM_WORLD_LOCAL_SIZE": local, "MASTER_PORT": str(port),
        }  # fmt: skip
        started.append(
            programs.start(
                "train.py", tmp_path, **(slurm if launcher == "srun" else mpi)
            )
        )
    for program in started:
        ended = programs.end(program)
        assert ended.code == 0, ended.err
    for result in results(tmp_path):
        assert_trained(result["weights"], result["val_loss"])
        assert result["world_size"] == result["again"] == 2


@pytest.mark.slow
def test_without_an_agent_each_rank_says_how_it_ended(
    programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(FAILING)
    for way, code, words in (
        ("raise", 1, ("in fail", "ValueError: a bad sample")),
        ("exit 3", 3, ("in fail", "SystemExit: 3")),
        ("kill late", -9, ()),
    ):
        place: dict[str, Any] = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        started = [
            programs.start("train.py", way, RANK=rank, LOCAL_RANK=rank, **place)
            for rank in ("0", "1")
        ]
        other, guilty = (programs.end(program) for program in started)
        if words:
            failed = "Rank 1 of 2 failed at epoch 1, batch 2, global step 7, in training_step of Failing:"
            assert in_order(guilty.err, failed, *words), guilty.err
        else:
            silent = "Rank 1 of 2 ended with no report of its own"
            seen = "last seen at epoch 1, batch 2, global step 7, in training_step of Failing\nRank 0 of 2 lost"
            assert in_order(other.err, silent, seen), other.err
        (line,) = re.findall("Rank 0 of 2.*", other.err)
        assert line.startswith("Rank 0 of 2 lost its peers at epoch 1, batch 2,")
        assert "Traceback" not in other.err
        assert (other.code, guilty.code) == (1, code)
        # Both have written into one file.
        told = json.loads((tmp_path / "failure.json").read_text())
        assert [rank["rank"] for rank in told["ranks"]] == [1, 0]
        assert (told["rank"], told["ranks"][1]["kind"]) == (1, "lost")


KILLED_WHILE_IT_WRITES = (
    DEFINITIONS
    + """
import os
import signal
import threading

flush = os.fsync

def kill(file):
    if os.environ["RANK"] == "1" and threading.current_thread() is not threading.main_thread():
        os.kill(os.getpid(), signal.SIGKILL)
    flush(file)

os.fsync = kill
trainer = Trainer(
    accelerator="cpu", strategy="fsdp", max_epochs=2, logger=False, callbacks=[ModelCheckpoint(every_n_train_steps=2)],
    enable_progress_bar=False, enable_model_summary=False,
)
# Each rank has a part of it.
module.layer = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
trainer.fit(module, DataLoader(data, 1))
"""
)


@pytest.mark.slow
def test_who_is_killed_while_it_writes_its_part_is_not_waited_for(
    programs: Programs, tmp_path: Path
) -> None:
    """The main rank waits for what it tells of its part, for half an hour if it came to that."""
    (tmp_path / "train.py").write_text(KILLED_WHILE_IT_WRITES)
    place: dict[str, Any] = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    other, _ = [
        programs.start("train.py", RANK=rank, LOCAL_RANK=rank, **place)
        for rank in ("0", "1")
    ]
    ended = programs.end(other)
    silent = "Rank 1 of 2 ended with no report of its own"
    assert in_order(ended.err, silent, "Rank 0 of 2 lost its peers"), ended.err
    assert ended.code == 1


# -- machines ---------------------------------------------------------------------------------------------------------

# Within a network namespace: a name of its own, that all machines resolve, as in a cluster; and no name server to ask.
ON_MACHINE = """
hostname "$0" && mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && shift && exec "$@"
"""


def ip(*arguments: str) -> None:
    subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=10
    )


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, ip and unshare")
    tag = uuid.uuid4().hex[:6]
    names, cards = [f"lw{tag}a", f"lw{tag}b"], [f"lw{tag}x", f"lw{tag}y"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                cards[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cards[1],
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        for name, card, address in zip(
            names, cards, ("10.77.0.1/24", "10.77.0.2/24"), strict=True
        ):
            ip("-n", name, "addr", "add", address, "dev", card)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", card, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(
                ["ip", "netns", "del", name],
                check=False,
                capture_output=True,
                timeout=10,
            )


def test_two_machines(machines: list[str], programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    (tmp_path / "hosts").write_text(
        "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n"
    )
    options = (
        "--nnodes",
        2,
        "--nproc-per-node",
        1,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "node1:29400",
    )
    started = []
    for name, host in zip(machines, ("node1", "node2"), strict=True):
        on = (
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            ON_MACHINE,
            host,
        )
        command = (
            *TORCHRUN,
            *options,
            "train.py",
            tmp_path,
            "--devices",
            1,
            "--num-nodes",
            2,
        )
        started.append(programs.start(*command, prefix=(*on, str(tmp_path / "hosts"))))
    for program in started:
        ended = programs.end(program)
        assert ended.code == 0, ended.err
    found = results(tmp_path)
    assert found[0]["weights"] == found[1]["weights"]
    for result in found:
        assert_trained(result["weights"], result["val_loss"])
        assert (result["world_size"], result["num_nodes"]) == (2, 2)
