"""Optimization and intervals of Lightning's, in a program for it that prints what they did as JSON."""

import csv
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

folder = Path(sys.argv[1])
warnings.simplefilter("ignore")
quiet = dict(
    accelerator="cpu",
    devices=1,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    log_every_n_steps=1,
)


class Net(pl.LightningModule):
    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.optimizer = optimizer
        self.validated = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        loss = self.training_step(batch, batch_idx)
        self.log("val", loss, on_step=True, on_epoch=True)

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return self.optimizer and self.optimizer(self.parameters(), lr=0.1)


def loader(count=16):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=2)


def weights(model):
    state = sorted(model.state_dict().items())
    return [round(w, 5) for _, value in state for w in value.flatten().tolist()]


found = {}
model = Net()
scheduler = GradientAccumulationScheduler({0: 4, 2: 2})
trainer = pl.Trainer(max_epochs=4, logger=False, callbacks=scheduler, **quiet)
trainer.fit(model, loader())
found["scheduled"] = [weights(model), trainer.global_step, scheduler.epochs]
found["going to"] = scheduler.going_to_accumulate_grad_batches()

model = Net(None)
trainer = pl.Trainer(max_epochs=1, logger=False, **quiet)
trainer.fit(model, loader())
found["none"] = [weights(model), trainer.global_step]

logger = CSVLogger(folder)
model = Net()
trainer = pl.Trainer(max_epochs=2, logger=logger, **quiet)
trainer.fit(model, loader(4), loader(6))
with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["val_step"]]
found["rows"] = [[int(row["step"]), round(float(row["val_step"]), 5)] for row in rows]

for name, interval in (
    ("always", {"microseconds": 1}),
    ("never", timedelta(hours=1)),
    ("text", "00:01:00:00"),
):
    model = Net()
    trainer = pl.Trainer(
        max_epochs=1, logger=False, val_check_interval=interval, **quiet
    )
    trainer.fit(model, loader(), loader(2))
    found[name] = model.validated
print("FOUND" + json.dumps(found))
