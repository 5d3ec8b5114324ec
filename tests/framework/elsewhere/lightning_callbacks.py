"""Callbacks of Lightning's, in a program for it that prints what they did as JSON."""

import csv
import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    ModelPruning,
    ThroughputMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from torch.utils.data import DataLoader, TensorDataset

folder = Path(sys.argv[1])
quiet = dict(
    accelerator="cpu",
    devices=1,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    log_every_n_steps=1,
)


class Net(pl.LightningModule):
    flops_per_batch = 100

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.layer(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))

    def predict_step(self, batch, batch_idx):
        return batch[0].sum(dim=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def loader(**options):
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=2, **options)


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch_and_epoch")
        self.seen = []

    def write_on_batch_end(
        self,
        trainer,
        pl_module,
        prediction,
        batch_indices,
        batch,
        batch_idx,
        dataloader_idx,
    ):
        self.seen.append(
            [prediction.tolist(), [*batch_indices], batch_idx, dataloader_idx]
        )

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.seen.append([[p.tolist() for p in predictions], batch_indices])


found = {}
rows = {
    "pruning_fn": "ln_structured",
    "use_global_unstructured": False,
    "pruning_dim": 0,
    "pruning_norm": 1,
    "parameter_names": ["weight"],
    "use_lottery_ticket_hypothesis": False,
}
for name, epochs, options in (
    ("global", 3, {"use_lottery_ticket_hypothesis": False}),
    ("rows", 3, rows),
    (
        "kept",
        2,
        {"make_pruning_permanent": False, "use_lottery_ticket_hypothesis": False},
    ),
    # What Lightning has set back once, it trains together with the copy that it sets back to.
    ("lottery", 1, {"amount": 0.25}),
):
    model = Net()
    pruning = ModelPruning(**{"pruning_fn": "l1_unstructured", **options})
    trainer = pl.Trainer(max_epochs=epochs, logger=False, callbacks=pruning, **quiet)
    trainer.fit(model, loader(), loader())
    found[name] = {
        key: value.tolist() for key, value in sorted(model.state_dict().items())
    }

writer = Writer()
trainer = pl.Trainer(logger=False, callbacks=writer, **quiet)
trainer.predict(Net(), loader(shuffle=False), return_predictions=False)
found["predictions"] = writer.seen

logger = CSVLogger(folder)
throughput = ThroughputMonitor(
    batch_size_fn=lambda batch: len(batch[0]),
    length_fn=lambda batch: batch[0].numel(),
    window_size=3,
)
profiler = SimpleProfiler(dirpath=folder / "profiles", filename="simple")
trainer = pl.Trainer(
    max_epochs=1,
    limit_val_batches=0,
    logger=logger,
    callbacks=[throughput, DeviceStatsMonitor()],
    profiler=profiler,
    **quiet,
)
trainer.fit(Net(), loader())
with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
    rows = list(csv.DictReader(file))
found["names"] = sorted(rows[0])
counts = [row for row in rows if row["train/batches"]]
for name in ("train/batches", "train/samples", "train/lengths"):
    found[name] = [float(row[name]) for row in counts]
found["rates"] = [bool(row["train/device/samples_per_sec"]) for row in counts]
profiler = AdvancedProfiler(dirpath=folder / "profiles", filename="advanced")
pl.Trainer(max_epochs=1, logger=False, profiler=profiler, **quiet).fit(Net(), loader())
found["files"] = sorted(path.name for path in (folder / "profiles").iterdir())
print("FOUND" + json.dumps(found))
