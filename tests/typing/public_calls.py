"""What type checkers make of the public calls. Nothing here is run: `make check` lets pyright read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import loopwright
from loopwright import DataModule, Engine, ModelCheckpoint, Module, Trainer
from loopwright.callbacks import Callback, EarlyStopping
from loopwright.loggers import Logger
from loopwright.strategies import DDPStrategy, Strategy


class Adversaries(Module):
    """Manual optimization: two optimizers are unpacked, one is used as it is."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(width, width)
        self.discriminator = nn.Linear(width, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        g, d = self.optimizers()
        g.update(self.generator(batch).sum())
        d.step()
        self.log("loss", 1.0, prog_bar=True)
        assert_type(self.current_epoch, int)
        return self.discriminator(batch).sum()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.children()]


class Single(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.step()
        scheduler = self.lr_schedulers()
        scheduler.step()


class Numbers(DataModule):
    def train_dataloader(self) -> Any:
        return [torch.zeros(2, 4)]


class Prints(Callback):
    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert_type(trainer.global_step, int)
        assert_type(trainer.callback_metrics, dict[str, Tensor])


def trainers(loader: DataLoader[Any]) -> None:
    trainer = Trainer(
        devices=2,
        strategy=DDPStrategy(static_graph=True),
        callbacks=[Prints(), ModelCheckpoint(monitor="loss"), EarlyStopping("loss")],
        max_epochs=2,
    )
    assert_type(trainer.fit(Adversaries(), loader), None)
    assert_type(trainer.fit(Adversaries(), datamodule=Numbers()), None)
    assert_type(trainer.validate(Adversaries(), loader), list[dict[str, float]])
    assert_type(trainer.test(dataloaders=loader), list[dict[str, float]])
    assert_type(trainer.callbacks, list[Callback])
    assert_type(trainer.checkpoint_callback, ModelCheckpoint | None)
    assert_type(trainer.early_stopping_callbacks, list[EarlyStopping])
    assert_type(trainer.logger, Logger | None)
    assert_type(trainer.strategy, Strategy)
    assert_type(trainer.should_stop, bool)


def classes_of_checkpoints() -> None:
    assert_type(Adversaries.load_from_checkpoint("a.ckpt", width=8), Adversaries)
    assert_type(Numbers.load_from_checkpoint("a.ckpt"), Numbers)


def engines(model: nn.Linear, loader: DataLoader[Any]) -> None:
    engine = Engine(precision="bf16-mixed", gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters())
    assert_type(engine.prepare(model), nn.Linear)
    assert_type(
        engine.prepare(model, optimizer, loader),
        tuple[nn.Linear, torch.optim.SGD, DataLoader[Any]],
    )
    model, optimizer = engine.prepare(model, optimizer)
    with engine.accumulate(model):
        assert_type(engine.backward(model(torch.zeros(4)).sum()), None)
    assert_type(engine.is_main_process, bool)


def the_root() -> None:
    assert_type(loopwright.__version__, str)
    assert_type(loopwright.Trainer(), Trainer)
