"""Callbacks of Lightning's in two processes, in a program for it that prints what they did as JSON."""

import csv
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

folder = Path(sys.argv[1])
found = {}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lr = 0.1
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        self.head = torch.nn.Linear(4, 1)
        self.rates = []

    def training_step(self, batch, batch_idx):
        groups = self.optimizers().optimizer.param_groups
        self.rates.append([group["lr"] for group in groups])
        loss = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
        self.log("val", loss, sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return batch[0].sum(dim=1)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.lr, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Writer(BasePredictionWriter):
    seen = ()

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.seen = [[p.tolist() for p in predictions], batch_indices]


def loader():
    """Each process's own samples: of shared ones, Lightning shuffles those to train on, and ours deals batches."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    x = x[int(os.environ["RANK"]) :: 2]
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=2)


def trainer(*callbacks, **options):
    defaults = dict(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        max_epochs=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(name, *callbacks, **options):
    model = Net()
    made = trainer(*callbacks, **options)
    made.fit(model, loader(), loader())
    both = [None, None]
    torch.distributed.all_gather_object(both, model.backbone[0].weight.sum().item())
    found[f"{name} differ"] = both[0] != both[1]
    state = sorted(model.state_dict().items())
    found[name] = [[key, value.tolist()] for key, value in state]
    # Those of a search are looked at by its suggestion.
    found[f"{name} rates"] = model.rates[-12:]
    return made


fit("ema", EMAWeightAveraging(decay=0.8, use_buffers=False))
fit("swa", StochasticWeightAveraging(0.02, 2, annealing_epochs=1))
fit("accumulation", GradientAccumulationScheduler({0: 1, 1: 2}))
# What was frozen at first, Lightning's processes each train for themselves: of these, the rates are compared.
fit("finetuning", BackboneFinetuning(1))
lottery = {"use_lottery_ticket_hypothesis": False}
fit("pruning", ModelPruning("l1_unstructured", amount=0.2, **lottery))
finder = LearningRateFinder(1e-4, num_training_steps=30, early_stop_threshold=None)
fit("finder", finder, max_epochs=8)
found["rate"] = finder.optimal_lr.suggestion()
found["rate losses"] = finder.optimal_lr.results["loss"]
tuner = Tuner(trainer(max_epochs=8))
found["tuned"] = tuner.lr_find(
    Net(), loader(), num_training=30, early_stop_threshold=None
).suggestion()

logger = CSVLogger(folder)
stops = EarlyStopping("val", patience=0, min_delta=9.0)
saves = ModelCheckpoint(folder / "saved", monitor="val", filename="{epoch}-{step}")
counts = ("train/batches", "train/samples")
length = {"batch_size_fn": lambda batch: len(batch[0]), "window_size": 3}
monitors = [
    LearningRateMonitor("step"),
    ThroughputMonitor(**length),
    DeviceStatsMonitor(cpu_stats=True),
]
made = fit("logged", stops, saves, *monitors, logger=logger, max_epochs=5)
found["stopped"] = [stops.stopped_epoch, float(stops.best_score)]
found["saved"] = [Path(saves.best_model_path).name, float(saves.best_model_score)]
writer = Writer("epoch")
trainer(writer).predict(Net(), loader(), return_predictions=False)
found["predictions"] = writer.seen
if made.is_global_zero:
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
        # What a device tells differs from run to run: of that, its names are compared.
        found["device"] = sorted(key for key in rows[0] if "DeviceStats" in key)
        for row in rows:
            for key, value in row.items():
                if value and key in (
                    "loss_step",
                    "loss_epoch",
                    "val",
                    "lr-SGD",
                    *counts,
                ):
                    found.setdefault(f"row {key}", []).append(float(value))
    (folder / "found.json").write_text(json.dumps(found))
