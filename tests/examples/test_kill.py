"""A program that is killed by the operating system, and started again, ends as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import restarts
from tests.programs import run_program

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# The example's model and data, checkpoints every 7 steps, and an end by SIGKILL at a given step (0: none).
PROGRAM = """
import os, signal, sys

sys.path.insert(0, {examples!r})
from digits import ConvNet, Digits

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import Trainer, seed_everything
from loopwright.loggers import CSVLogger


class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)


seed_everything(3)
module = ConvNet(channels=8)
trainer = Trainer(
    max_epochs=4,
    logger=CSVLogger("logs"),
    callbacks=[
        ModelCheckpoint(monitor="val_loss"),
        ModelCheckpoint(every_n_train_steps=7),
        EarlyStopping("val_loss"),
        Kill(),
    ],
    log_every_n_steps=5,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, datamodule=Digits(num_workers=2), ckpt_path="last")
trainer.save_checkpoint("end.ckpt")
"""


def run(folder: Path, kill_at: int) -> int:
    """The exit status of the program, run in ``folder``."""
    folder.mkdir(exist_ok=True)
    ended = run_program(
        "-c", PROGRAM.format(examples=str(EXAMPLES)), kill_at, cwd=folder
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, 0) == 0
    assert run(killed, 47) == -signal.SIGKILL  # in the third epoch of 20 steps
    assert run(killed, 0) == 0

    for file in ("model/model.safetensors", "optimizer/optimizer.safetensors"):
        expected, got = (
            load_file(folder / "end.ckpt" / file) for folder in (whole, killed)
        )
        assert expected.keys() == got.keys()
        assert all(expected[name].equal(got[name]) for name in expected), file
    # The rows that were logged, once each, and in one folder.
    rows, after_kills = (
        [file.read_text() for file in (folder / "logs").rglob("*.csv")]
        for folder in (whole, killed)
    )
    assert rows == after_kills
    assert len(list((killed / "logs").rglob("checkpoints"))) == 1


@pytest.mark.slow
def test_random_kills():
    """In one process, two and three, in saves and between them; the benchmark compares everything that is left."""
    # What a first optimizer imports is imported before the processes are forked, instead of in each of them.
    program = "import runpy, torch._dynamo; runpy.run_module('benchmarks', run_name='__main__')"
    ended = run_program(
        "-c", program, "kills", "--kills", 6, timeout=110, cwd=EXAMPLES.parent
    )
    assert ended.returncode == 0, ended.stderr


def run_faults(only: str) -> None:
    """Run cells of the benchmark; it ends with 1 if one of them falls short."""
    command = ("-m", "benchmarks", "faults", "--part", "grid", "--only", only)
    ended = run_program(*command, timeout=170, cwd=EXAMPLES.parent)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_what_goes_wrong_in_a_save_is_reported_and_resumed():
    """By the rank that does not write."""
    run_faults("^raise / save / rank 1")


@pytest.mark.slow
def test_what_goes_wrong_in_the_middle_is_reported_and_resumed():
    """By a signal, and by standing still while Python's lock is kept."""
    run_faults("^(SIGTERM|blocks in C with Python's lock) / mid / rank 1")


@pytest.mark.slow
def test_ranks_that_are_killed_are_started_again(tmp_path: Path):
    """The curves and weights of the job are those of an undisturbed training."""
    loggers = ("csv", "jsonl")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    restarts.run(whole, 16, loggers)
    restarts.run(killed, 16, loggers, [signal.SIGKILL] * 2, (0.6, 0.8))
    restarts.compare_ends(killed, whole, 16)
    assert "\nRestart 2 of 20\n" in (killed / "output.txt").read_text()
