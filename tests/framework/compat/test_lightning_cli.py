"""Lightning's command line: its names and conventions on Loopwright's classes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loopwright.lightning import LightningModule
from loopwright.lightning.callbacks import ModelCheckpoint
from loopwright.lightning.cli import (
    LightningCLI,
    OptimizerCallable,
    SaveConfigCallback,
)
from loopwright.lightning.demos import BoringModel
from loopwright.lightning.loggers import CSVLogger
from loopwright.lightning.plugins import SLURMEnvironment
from loopwright.lightning.strategies import DDPStrategy
from loopwright.lightning.utilities import MisconfigurationException


class Injected(BoringModel):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def test_a_module_is_made_again_by_lightnings_conventions() -> None:
    cli = LightningCLI(
        args=[
            "fit",
            f"--model={__name__}.Injected",
            "--model.optimizer=torch.optim.Adam",
            "--model.optimizer.lr=0.5",
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=0",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    folder = Path(cli.trainer.log_dir)
    assert folder.parent.name == "lightning_logs"
    read = yaml.safe_load((folder / "config.yaml").read_text())
    assert read["model"]["class_path"] == f"{__name__}.Injected"
    (path,) = (folder / "checkpoints").iterdir()
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    assert saved["_class_path"] == f"{__name__}.Injected"
    loaded = LightningModule.load_from_checkpoint(path)
    assert type(loaded) is Injected
    assert loaded.configure_optimizers().param_groups[0]["lr"] == 0.5


def test_a_name_alone_is_that_of_lightnings_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(ModelCheckpoint, "keep")

    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "3")
    cli = CLI(
        BoringModel,
        parser_kwargs={"default_env": True},
        args=[
            "--trainer.strategy=DDPStrategy",
            "--trainer.strategy.find_unused_parameters=true",
            "--trainer.devices=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=CSVLogger",
            "--trainer.logger.save_dir=logs",
            "--trainer.plugins=[SLURMEnvironment]",
            "--trainer.callbacks=[{class_path: TQDMProgressBar}, {class_path: Timer}]",
            "--keep.save_top_k=-1",
        ],
        run=False,
    )
    assert isinstance(cli.config_init.trainer.strategy, DDPStrategy)
    assert isinstance(cli.trainer.logger, CSVLogger)
    assert isinstance(cli.config_init.trainer.plugins[0], SLURMEnvironment)
    assert cli.trainer.checkpoint_callback.save_top_k == -1
    assert cli.trainer.max_epochs == 3
    assert any(isinstance(c, SaveConfigCallback) for c in cli.trainer.callbacks)
    with pytest.raises(MisconfigurationException, match="Cannot add arguments from"):
        cli.parser.add_lightning_class_args(int, "number")
