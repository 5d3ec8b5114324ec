"""Objects of a script's own classes: in its other processes, in its checkpoints, and in another program."""

from __future__ import annotations

import enum
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from loopwright.framework import CheckpointError
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.strategies.pickling import dumps, loads
from tests.programs import run_program

SCRIPT = """
import enum
from dataclasses import dataclass

import torch
from torch import nn

from loopwright.framework import Engine, Module, Trainer


class Kind(enum.Enum):
    SMALL = 1


@dataclass
class Config:
    kind: Kind = Kind.SMALL


class Net(Module):
    def __init__(self, kind, config, make):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def predict_step(self, batch, batch_idx):
        return Config()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def is_ours(config):
    return isinstance(config, Config) and config.kind is Kind.SMALL


if __name__ == "__main__":
    trainer = Trainer(devices=2, max_epochs=1, accelerator="cpu", enable_checkpointing=False, logger=False)
    trainer.fit(Net(Kind.SMALL, Config(), lambda: Kind.SMALL), [torch.ones(1, 1)] * 2)
    trainer.save_checkpoint("a.ckpt")
    again = Net.load_from_checkpoint("a.ckpt", weights_only=False).hparams
    assert again.kind is Kind.SMALL and is_ours(again.config) and again.make() is Kind.SMALL
    predicted = trainer.predict(Net(1, 2, 3), [torch.ones(1, 1)] * 2, return_predictions="all")
    engine = Engine(devices=2, accelerator="cpu")
    told = engine.gather_object((Config(), lambda: Kind.SMALL))
    assert all(map(is_ours, [*predicted, *(config for config, _ in told)]))
    assert all(make() is Kind.SMALL for _, make in told)
    assert engine.broadcast(Kind.SMALL, from_process=1) is Kind.SMALL
    assert all(map(is_ours, engine.gather_for_metrics([Config()])))
    engine.print("all ours")
"""


def test_a_scripts_objects_stay_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path(tmp_path, "training_script.py").write_text(SCRIPT)
    ended = run_program("training_script.py", cwd=tmp_path)
    assert "all ours" in ended.stdout, ended.stderr
    assert ended.returncode == 0

    path = str(tmp_path / "a.ckpt")
    hparams = load_checkpoint(path, weights_only=False)["hyper_parameters"]
    with pytest.raises(
        CheckpointError,
        match=r"'hyper_parameters.kind' was pickled in the program 'training_script'.*Kind",
    ):
        hparams["kind"].value  # noqa: B018 # to read it raises
    monkeypatch.syspath_prepend(tmp_path)
    script = importlib.import_module("training_script")
    hparams = load_checkpoint(path, weights_only=False)["hyper_parameters"]
    assert hparams["kind"] is script.Kind.SMALL
    assert script.is_ours(hparams["config"])
    assert hparams["make"]() is script.Kind.SMALL


IMPORTED_BEFORE = """
import sys

from loopwright.strategies.pickling import loads


class Kind:
    pass


# As another program has pickled it that imports this one.
assert loads(b"cscript_of_its_own\\nKind\\n.", "another_script") is Kind
assert "script_of_its_own" not in sys.modules
"""


def test_a_script_finds_its_classes_that_were_pickled_where_it_was_imported(
    tmp_path: Path,
):
    Path(tmp_path, "script_of_its_own.py").write_text(IMPORTED_BEFORE)
    ended = run_program("script_of_its_own.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


class Kind(enum.Enum):
    SMALL = 1


def test_what_has_a_name_is_named_and_the_rest_is_sent_whole():
    class Local:
        kind = Kind.SMALL

    both: Any = loads(dumps([Local(), Kind.SMALL, lambda: Kind.SMALL]), "")
    assert both[0].kind is both[1] is both[2]() is Kind.SMALL
    assert loads(dumps(Kind), "") is Kind
    assert b"SMALL" not in dumps(Kind)


def test_objects_of_older_checkpoints_are_read(tmp_path: Path):
    from loopwright.framework.checkpoint.reader import unpickle_objects

    assert unpickle_objects(pickle.dumps({"mine": pickle.dumps(Kind.SMALL)})) == {
        "mine": Kind.SMALL
    }
