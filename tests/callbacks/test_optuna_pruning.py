from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from loopwright.callbacks import OptunaPruningCallback
from tests.framework.models import Evaluated, loader
from tests.programs import run_program
from tests.strategies.distributed import quiet

optuna = pytest.importorskip("optuna")


class Logs(Evaluated):
    """Its validation loss is a number that it is given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * 0 + self.value


def study_of(values: list[float], **arguments: Any) -> Any:
    """A study with a trial for each value, pruned by the median of those before."""
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(1, 0))
    for value in values:
        study.enqueue_trial({"value": value})

    def objective(trial: Any) -> float:
        value = trial.suggest_float("value", 0, 1)
        callback = OptunaPruningCallback(trial, "val_loss")
        trainer = quiet(callbacks=[callback], **arguments)
        trainer.fit(Logs(value), loader(), loader())
        return float(trainer.callback_metrics["val_loss"])

    study.optimize(objective, n_trials=len(values))
    return study


def told(study: Any) -> list[tuple[str, list[int]]]:
    return [(trial.state.name, [*trial.intermediate_values]) for trial in study.trials]


def test_a_trial_is_pruned_by_what_its_epochs_have_reported():
    study = study_of([0.5, 0.75, 0.25], max_epochs=3)
    assert told(study) == [
        ("COMPLETE", [0, 1, 2]),
        ("PRUNED", [0]),
        ("COMPLETE", [0, 1, 2]),
    ]
    assert study.trials[1].intermediate_values[0] == pytest.approx(0.75)


def test_several_validations_of_an_epoch_are_steps_of_their_own():
    study = study_of([0.5, 0.75], max_epochs=2, val_check_interval=2)
    assert told(study) == [("COMPLETE", [0, 1, 2, 3]), ("PRUNED", [0])]
    study = study_of([0.5], max_epochs=4, check_val_every_n_epoch=2)
    assert told(study) == [("COMPLETE", [1, 3])]


def test_a_name_that_is_not_logged_is_an_error():
    trial = optuna.create_study().ask()
    trainer = quiet(callbacks=[OptunaPruningCallback(trial, "val_los")])
    with pytest.raises(RuntimeError, match="Did you mean 'val_loss'"):
        trainer.fit(Evaluated(), loader(), loader())


def test_a_copy_reaches_the_trial_where_it_is():
    """As the processes of a notebook do, whatever the storage; and what comes back from there is not taken for it."""
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.5))
    trial = study.ask()
    callback = OptunaPruningCallback(trial, "val_loss")
    copied = copy.deepcopy(callback)
    trainer = quiet(callbacks=[copied])
    with pytest.raises(optuna.TrialPruned, match=r"epoch 0, step 4: val_loss = 0\.75"):
        trainer.fit(Logs(0.75), loader(), loader())
    assert study.trials[0].intermediate_values == {0: 0.75}
    assert "_trial" not in copied.__getstate__()


PROGRAM = """
import os
import optuna
import torch
from loopwright.callbacks import OptunaPruningCallback
from loopwright.framework import Module, Trainer


class Net(Module):
    def __init__(self, value):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.value = value

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.value)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(trial, value):
    callbacks = [OptunaPruningCallback(trial, "val_loss")]
    trainer = Trainer(accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
    data = [torch.ones(2, 4)] * 4
    trainer.fit(Net(value), data, data)
    return float(trainer.callback_metrics["val_loss"])


study = optuna.create_study(sampler=optuna.samplers.RandomSampler(3), pruner=optuna.pruners.MedianPruner(1, 0))
study.optimize(lambda trial: fit(trial, trial.suggest_float("value", 0, 1)), n_trials=2)
rank = os.environ.get("RANK")
if rank in (None, "0"):
    print([(trial.state.name, [*trial.intermediate_values]) for trial in study.trials])
if rank is not None:
    trial = optuna.trial.FixedTrial({"value": int(rank)})
    try:
        fit(trial, trial.suggest_float("value", 0, 1))
    except ValueError as error:
        print(error)
"""
PRUNED = "[('COMPLETE', [0, 1]), ('PRUNED', [0])]"


@pytest.mark.slow
def test_two_processes_prune_together(tmp_path: Path):
    """From a notebook, whose study is in one process, and in a script, each of whose processes has one."""
    run = run_program("-c", PROGRAM, timeout=170)
    assert PRUNED in run.stdout, run.stderr
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = run_program(program, timeout=170)
    assert PRUNED in run.stdout, run.stderr
    assert run.stdout.count("the processes have different trials") == 2
