"""What a bare training step may cost, in counts; times are measured by `make bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.calls import MAX_CALLS, MAX_FRAMES, Counts, count
from tests.programs import run_program


@pytest.fixture
def ours() -> Counts:
    return count("loopwright")


def test_few_frames_lie_between_fit_and_the_users_step(ours: Counts):
    assert 0 < ours.frames <= MAX_FRAMES, (
        "fewer hops: whoever debugs a step reads all of them"
    )


def test_a_bare_step_calls_few_python_functions(ours: Counts):
    assert ours.calls <= MAX_CALLS


def test_a_bare_step_calls_hardly_more_than_a_loop_by_hand(ours: Counts):
    assert ours.calls - count("raw").calls <= 20, "what nobody overrides is not called"


# With all that a Trainer does when nothing is switched off.
PROGRAM = """
import sys
import torch
from loopwright.framework import Module, Trainer

class Model(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.before = None
    def training_step(self, batch, batch_idx):
        if self.before is None:
            self.before = set(sys.modules)
        loss = self.layer(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).mean())
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
    def on_train_end(self):
        print("imported:", *sorted(set(sys.modules) - self.before))

data = torch.utils.data.DataLoader(torch.ones(16, 2), 2)
trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, log_every_n_steps=2)
trainer.fit(Model(), data, data)
"""


@pytest.mark.slow
def test_nothing_is_imported_for_the_first_time_inside_the_loop(tmp_path: Path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    ended = run_program(program, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("imported:")]
    assert lines == ["imported:"]


@pytest.mark.parametrize(
    ("loader", "way", "most"),
    [
        ("iterable", "bare", 14),
        ("CombinedLoader", "bare", 15),
        ("list", "accumulation", 20),
        ("list", "clipping", 22),
        ("list", "manual", 35),
    ],
)
def test_a_step_calls_few_functions_more_than_the_loop_by_hand(
    loader: str, way: str, most: int
):
    asked = matrix.WAYS[way]
    by_hand = matrix.count(matrix.run_by_hand, loader, asked)
    assert matrix.count(matrix.run_trainer, loader, asked) - by_hand <= most
