"""A run with all loggers. ``KILL`` in its environment is the step at which it kills itself."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.loggers import (
    CometLogger,
    CSVLogger,
    JSONLinesLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)
from tests.callbacks.scripted import Scripted, loader, trainer


class Killed(Callback):
    """Ends the process as ``kill -9`` does, after all has gone to the services once."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            for logger in trainer.loggers:
                assert logger.experiment is not trainer
        if str(trainer.global_step) == os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)


class Showing(Scripted):
    """Has hyperparameters, and shows one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1, "nested": {"name": "sgd"}})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            self.log_image("image", torch.eye(4).expand(3, 4, 4), caption="a square")
            self.log_text("text", "hello")
            self.log_table("table", {"a": [1, 2], "b": ["x", "y"]})
            self.log_histogram("histogram", torch.arange(8.0), bins=4)


def run() -> None:
    """Fit, from the last checkpoint if there is one, and test."""
    torch.manual_seed(0)
    loggers: list[Logger] = [
        TensorBoardLogger("board"),
        CSVLogger("csv"),
        JSONLinesLogger("lines"),
        WandbLogger(save_dir="wandb_here", project="all", offline=True),
        MLFlowLogger(save_dir="mlflow_here"),
        MLFlowLogger(save_dir="files_here", tracking_uri=os.path.abspath("files")),
        CometLogger(
            online=False,
            offline_directory="comet_here",
            log_env_details=False,
            log_code=False,
            log_git_metadata=False,
        ),
        TrackioLogger("all", auto_log_cpu=False, auto_log_gpu=False),
    ]
    saved = ModelCheckpoint(dirpath="saved", every_n_train_steps=3, save_last=True)
    made = trainer(saved, Killed(), logger=loggers)
    made.fit(Showing(), loader(), loader(2), ckpt_path="last")
    made.test(dataloaders=loader(2), verbose=False)


if __name__ == "__main__":
    run()
    sys.exit()
