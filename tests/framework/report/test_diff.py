"""``loopwright diff``: settings, and the first step at which two runs part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Trainer
from loopwright.framework.command_line.main import main
from loopwright.framework.report.trace import Trace
from tests.framework.models import Linear
from tests.programs import run_program
from tests.strategies.distributed import quiet


class Logging(Linear):
    """Linear regression whose learning rate is a hyperparameter, and may change in the middle."""

    def __init__(self, lr: float = 0.1, later: float | None = None) -> None:
        super().__init__(lr)
        self.save_hyperparameters("lr")
        self.later = later

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.later is not None and batch_idx == 7:
            self.trainer.optimizers[0].param_groups[0]["lr"] = self.later
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


def run(folder: Path, module: Logging, **options: Any) -> str:
    """Train, and return the log folder."""
    torch.manual_seed(0)
    module.layer.reset_parameters()
    data = TensorDataset(torch.randn(24, 2), torch.randn(24, 1))
    trainer: Trainer = quiet(
        logger="csv", default_root_dir=folder, log_every_n_steps=1, **options
    )
    trainer.fit(module, DataLoader(data, 2))
    return trainer.log_dir


def test_it_tells_settings_and_the_first_step_of_which_both_have_fingerprints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = run(tmp_path, Logging(), fingerprint=2)
    same = run(tmp_path, Logging(), fingerprint=3)
    other = run(tmp_path, Logging(later=0.2), fingerprint=3, min_steps=4)
    slower = run(tmp_path, Logging(0.01))
    capsys.readouterr()

    assert main(["diff", first, same, "--no-replay"]) == 0
    out = capsys.readouterr().out
    assert "config.trainer.fingerprint" in out
    assert "2 → 3" in out
    assert "Fingerprints: all 3 are equal, up to step 12." in out

    assert main(["diff", same, other, "--no-replay"]) == 1
    out = capsys.readouterr().out
    assert "config.trainer.min_steps  none → 4" in out
    assert "they differ at step 9 in loss, gradients, parameters (" in out
    assert "step 6 is the last one at which all were equal" in out
    # The learning rate changed in batch 7, so that step 8 leaves other parameters.
    assert main(["diff", first, other, "--no-replay"]) == 1
    assert "they differ at step 12" in capsys.readouterr().out

    assert main(["diff", first, slower]) == 1
    out = capsys.readouterr().out
    assert "config.hyperparameters.lr" in out
    assert "0.1 → 0.01" in out
    assert "the second run has none. Trainer(fingerprint=100) keeps them" in out
    assert "Logged values: loss is " in out
    assert " at step 2." in out


def test_what_is_no_run_is_an_error_that_says_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = run(tmp_path / "one", Logging())
    run(tmp_path / "one", Logging())
    assert main(["diff", first, str(tmp_path / "none")]) == 2
    assert "there is no record in" in capsys.readouterr().err
    assert main(["diff", str(tmp_path), first]) == 2
    err = capsys.readouterr().err
    assert "there are 2 runs in" in err
    assert first in err


def test_traces_that_were_written_elsewhere_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [str(tmp_path / name) for name in ("first", "second")]
    for file, digits in zip(files, ("aa", "bb"), strict=True):
        Trace(gradients={"layer.bias": digits}).write(file)
    assert main(["diff", *files]) == 1
    text = "All modules give the same, and the gradients differ: first that of 'layer.bias'"
    assert text in capsys.readouterr().out
    assert main(["diff", files[0], files[0]]) == 0


PROGRAM = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from loopwright.framework import Module, Trainer, seed_everything

class Net(Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == int(sys.argv[1]):
            self.body[1].eps = 1e-2
        x, y = batch
        return (self.head(self.body(x)) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

seed_everything(0)
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
trainer = Trainer(max_epochs=1, fingerprint=3, accelerator="cpu", logger="csv", enable_progress_bar=False)
trainer.fit(Net(), DataLoader(data, 8, shuffle=True))
"""


@pytest.mark.slow
def test_by_replay_it_names_the_step_and_the_module_between_two_fingerprints(
    tmp_path: Path,
):
    (tmp_path / "train.py").write_text(PROGRAM)
    for changes_at in ("-1", "4"):
        done = run_program("train.py", changes_at, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    runs = [f"loopwright_logs/version_{number}" for number in (0, 1)]
    done = run_program("-m", "loopwright", "diff", *runs, timeout=300, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    *_, found, where = done.stdout.splitlines()
    assert found.startswith("Fingerprints: they differ at step 6 in loss")
    assert where == (
        "Step 5: the first module whose output differs is 'body.1' (LayerNorm): its inputs and its parameters are the "
        "same."
    )
