"""Back to a step: the black box of a run that fails, and `loopwright replay` and `batch`, as users start them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback, LambdaCallback
from loopwright.framework import Module, Trainer, seed_everything
from loopwright.framework.report.batch import describe, find_window
from loopwright.framework.report.packed import read_packed, write_packed
from loopwright.framework.report.rerun import RerunError, find_record, rerun
from loopwright.loggers import CSVLogger
from tests.programs import run_program

POISONED = 13

PROGRAM = """
import argparse
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import Module, Trainer
from loopwright.framework.report.fingerprints import Fingerprints

options = argparse.ArgumentParser()
options.add_argument("--devices", type=int, default=1)
options.add_argument("--poison", action="store_true")
options = options.parse_args()


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        # Augmented, in a worker.
        return {"x": torch.full((4,), float(index)) / 40 + torch.randn(4), "index": index}


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        if options.poison and self.global_step == 8 and self.global_rank == 1:
            raise ValueError("a poisoned batch")
        loss = self.layers(batch["x"]).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


print("it begins")
Trainer(
    accelerator="cpu", devices=options.devices, max_epochs=2, accumulate_grad_batches=2, logger="csv",
    log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[ModelCheckpoint(every_n_train_steps=3, save_top_k=-1), Fingerprints(1)],
).fit(Net(), DataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=1))
print("it ends")
"""


class Net(Module):
    """Raises at a sample, or has a loss that is none."""

    def __init__(self, raises_at: int = -1, nan_at: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.raises_at = raises_at
        self.nan_at = nan_at
        self.seen: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        samples = batch.flatten().tolist()
        self.seen.append(samples)
        if self.raises_at in samples:
            raise ValueError("a poisoned sample")
        loss = self.layer(batch).square().mean()
        if self.nan_at in samples:
            loss = loss * float("nan")
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(torch.utils.data.Dataset[Tensor]):
    """Each sample is its index."""

    def __len__(self) -> int:
        return 20

    def __init__(self, unreadable: int = -1) -> None:
        self.unreadable = unreadable

    def __getitem__(self, index: int) -> Tensor:
        if index == self.unreadable:
            raise OSError("cannot be read")
        return torch.tensor([float(index)])


def fit(folder: Path, module: Net, unreadable: int = -1, **arguments: Any) -> Trainer:
    seed_everything(1, verbose=False)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": CSVLogger(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": 3,
        "max_epochs": 3,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(**options | arguments)
    trainer.fit(module, DataLoader(Numbers(unreadable), batch_size=2, shuffle=True))
    return trainer


# The black box.


def test_a_step_that_raises_leaves_its_batch_and_its_samples(tmp_path: Path) -> None:
    module = Net(raises_at=POISONED)
    with pytest.raises(ValueError, match="a poisoned sample") as raised:
        fit(tmp_path, module)
    record = find_record(str(tmp_path))
    path = os.path.join(record, "black-box", "failure-0")
    # Under pytest, no program can be started again.
    assert getattr(raised.value, "__notes__", [path]) == [
        f"The step's batch and samples: {path}.json"
    ] or sys.version_info < (3, 11)
    box = read_packed(path)
    batch_idx = len(module.seen) - 1
    assert box["why"] == "ValueError: a poisoned sample"
    assert box["batch_idx"] == batch_idx
    assert box["step"] == batch_idx // 3 + 1
    assert box["window_start"] == batch_idx // 3 * 3
    assert box["batch"].flatten().tolist() == module.seen[-1]
    # Of the batches before, too; each sample of this dataset is its index.
    last = {int(idx): samples for idx, samples in box["samples"].items()}
    assert last == {
        idx: [int(x) for x in module.seen[idx]]
        for idx in range(max(0, batch_idx - 8), batch_idx + 1)
    }
    assert box["counters"]["global_step"] == batch_idx // 3
    assert {"python", "torch"} <= box["generators"].keys()


def test_a_batch_that_cannot_be_read_is_one_of_the_next_step(tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(OSError, match="cannot be read"):
        fit(tmp_path, module, POISONED, accumulate_grad_batches=1)
    path = os.path.join(find_record(str(tmp_path)), "black-box", "failure-0")
    box = read_packed(path)
    assert (box["step"], box["batch_idx"]) == (len(module.seen) + 1, len(module.seen))
    assert box["batch"] is None
    assert POISONED in box["samples"][str(len(module.seen))]


class Saves(Callback):
    """Cannot save."""

    phase: ClassVar[Literal["observe", "decide", "persist"]] = "persist"

    def on_train_batch_end(self, *_: Any) -> None:
        raise OSError("no space left")


def test_what_fails_beside_a_step_leaves_no_box(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path, Net(), callbacks=[Saves()])
    assert not [*tmp_path.rglob("failure-0.json")]


def test_a_loss_that_is_not_finite_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Net(nan_at=POISONED)
    fit(tmp_path, module, accumulate_grad_batches=1)
    step = next(i for i, seen in enumerate(module.seen, 1) if POISONED in seen)
    told = [line for line in caplog.messages if "train_loss is nan" in line]
    assert len(told) == 1
    assert (
        f"train_loss is nan at step {step}, and was finite at step {step - 1}. "
        in told[0]
    )
    box = read_packed(
        os.path.join(find_record(str(tmp_path)), "black-box", "not-finite-0")
    )
    assert box["batch"].flatten().tolist() == module.seen[step - 1]


def test_a_loss_that_no_row_shows_is_looked_at_when_the_epoch_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Net(nan_at=POISONED)
    fit(tmp_path, module, accumulate_grad_batches=1, log_every_n_steps=1000)
    told = [line for line in caplog.messages if " is nan at step " in line]
    assert len(told) == 1
    assert ", at an epoch's end. " in told[0]
    assert not [*tmp_path.rglob("not-finite-0.json")]


def test_a_box_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    batch = {
        "small": torch.arange(3),
        "large": torch.zeros(1000),
        "odd": object(),
        "text": "a",
    }
    path = str(tmp_path / "box")
    write_packed(path, {"batch": batch, "step": 3}, most_bytes=2000)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "box.json",
        "box.safetensors",
    ]
    read = read_packed(path)["batch"]
    assert read["small"].tolist() == [0, 1, 2]
    assert read["large"] is None
    assert read["text"] == "a"
    write_packed(path, {"batch": "a" * 3000, "step": 3}, most_bytes=2000)
    assert read_packed(path) == {"batch": None, "step": 3}


# Which sample.


def test_the_batches_of_a_step_follow_from_its_number(tmp_path: Path) -> None:
    found: list[Any] = []

    def look(trainer: Trainer, *_: Any) -> None:
        for step in range(1, 13):
            place = find_window(trainer.run, step)
            assert place is not None
            epoch, batches = place
            found.append([trainer.samples_of(batch, epoch) for batch in batches])
        trainer.run.loaders.begin_epoch()

    module = Net()
    fit(tmp_path, module, callbacks=[LambdaCallback(on_train_start=look)])
    # 10 batches in an epoch, and so windows of 3, 3, 3 and 1.
    assert found == [
        module.seen[first : min(first + 3, begin + 10)]
        for begin in (0, 10, 20)
        for first in range(begin, begin + 10, 3)
    ]


def test_a_sample_is_described() -> None:
    sample = {
        "x": torch.tensor([0.5, float("nan"), 2.0]),
        "name": "a",
        "y": torch.tensor(3),
    }
    assert (
        describe(sample)
        == "{x: float32 (3,) from nan to nan, 1 not finite, name: 'a', y: 3}"
    )


# What cannot be repeated is told before anything is started.


def test_a_step_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RerunError, match="there is no record in"):
        rerun(str(tmp_path), 1)
    fit(tmp_path, Net(), max_epochs=1)
    with pytest.raises(RerunError, match="one of a notebook, an interpreter or a test"):
        rerun(str(tmp_path), 1)
    with pytest.raises(RerunError, match="--step must be an integer from 1; got 0"):
        rerun(str(tmp_path), 0)
    with pytest.raises(RerunError, match="--rank must be from 0 to 0"):
        rerun(str(tmp_path), 1, 1)
    fit(tmp_path, Net(), max_epochs=1)
    with pytest.raises(RerunError, match="there are 2 runs in"):
        rerun(str(tmp_path), 1)


# Programs.


def loopwright(folder: Path, *arguments: Any, **options: Any) -> Any:
    """Run the command in another folder than the program's."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    options.setdefault("timeout", 240)
    return run_program("-m", "loopwright", *arguments, cwd=elsewhere, **options)


def test_a_replay_that_is_ended_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, Net())
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    words = ("replay", tmp_path, "--step", 2, "--", sys.executable, "-c", program)
    ended = loopwright(tmp_path, *words, timeout=60)
    assert ended.returncode == 143, ended.stderr
    assert not [*temporary.iterdir()]


@pytest.mark.slow
def test_two_processes_are_taken_back_to_a_step(tmp_path: Path) -> None:
    """A poisoned batch is met again by the printed command, and a step before it has the same bits."""
    (tmp_path / "train.py").write_text(PROGRAM)
    # The program does not seed its generators.
    failed = run_program(
        "train.py", "--devices", 2, "--poison", cwd=tmp_path, timeout=240
    )
    assert failed.returncode == 1, failed.stderr
    printed = re.search(r"^loopwright (replay .*)$", failed.stderr, re.MULTILINE)
    assert printed is not None, failed.stderr
    before = files_of(tmp_path)
    again = loopwright(tmp_path, *shlex.split(printed[1]))
    assert again.returncode == 1, again.stderr
    assert "step 9, rank 1 of 2: epoch 1, batch 6 to 7 (from " in again.stdout
    assert "equals that of the black box" in again.stdout
    assert "error             the one that was recorded" in again.stdout
    assert "\nValueError: a poisoned batch\n" in again.stderr

    run = tmp_path / "loopwright_logs"
    done = loopwright(tmp_path, "replay", run, "--step", 8, "--rank", 1)
    assert done.returncode == 0, done.stderr
    assert "step 8, rank 1 of 2: epoch 1, batch 4 to 5 (from " in done.stdout
    assert "step=6.ckpt" in done.stdout
    assert "equal to the fingerprints of 1 steps" in done.stdout
    assert "fingerprint       equals what was recorded, bit for bit" in done.stdout
    assert "it begins" not in done.stdout
    assert "it ends" not in done.stdout

    batch = loopwright(tmp_path, "batch", run, "--step", 8, "--rank", 1)
    assert batch.returncode == 0, batch.stderr
    assert samples_in(batch.stdout) == samples_in(done.stdout)
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_a_debugger_stops_before_the_step(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "train.py").write_text(PROGRAM)
    whole = run_program("-m", "package.train", cwd=tmp_path, timeout=240)
    assert whole.returncode == 0, whole.stderr
    before = files_of(tmp_path)
    asked = "p trainer.global_step, batch_idx, sorted(batch), type(optimizer).__name__\nc\np self.training\nc\n"
    done = loopwright(
        tmp_path,
        "replay",
        tmp_path,
        "--step",
        5,
        "--debugger",
        stdin=text(tmp_path, asked),
    )
    assert done.returncode == 0, done.stderr
    assert "(4, 8, ['index', 'x'], 'Adam')" in done.stdout
    assert "-> if options.poison and" in done.stdout
    assert "fingerprint       equals what was recorded, bit for bit" in done.stdout
    assert files_of(tmp_path) == before


def text(folder: Path, content: str) -> Any:
    """A file to read from."""
    file = folder / "elsewhere" / "input"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file.open()


def files_of(folder: Path) -> dict[str, int]:
    """The files of a program and its run, with the times of their last changes."""
    return {
        str(file): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file()
        and "elsewhere" not in file.parts
        and "__pycache__" not in file.parts
    }


def samples_in(output: str) -> list[str]:
    return re.findall(r"^samples +(.*)$", output, re.MULTILINE)
