"""Message passing on molecules: fit, test, predict, load, save and load its own file."""

import numpy as np
import torch
from chemprop import data, models, nn
from lightning import pytorch as pl
from reporting import QUIET, report, seed

seed()
smiles = ["C" * n + end for end in "ON" for n in range(1, 20)]
points = [
    data.MoleculeDatapoint.from_smi(text, np.array([float(n % 7)]))
    for n, text in enumerate(smiles)
]
train, rest = data.MoleculeDataset(points[:30]), data.MoleculeDataset(points[30:])
scaler = train.normalize_targets()
rest.normalize_targets(scaler)
train_loader = data.build_dataloader(train, batch_size=8, shuffle=False, num_workers=0)
loader = data.build_dataloader(rest, batch_size=8, shuffle=False, num_workers=0)
seed()
model = models.MPNN(
    nn.BondMessagePassing(d_h=16),
    nn.MeanAggregation(),
    nn.RegressionFFN(
        input_dim=16, output_transform=nn.UnscaleTransform.from_standard_scaler(scaler)
    ),
    batch_norm=True,
    metrics=[nn.metrics.RMSE(), nn.metrics.MAE()],
)
saves = pl.callbacks.ModelCheckpoint(
    "saved", "best-{epoch}", "val_loss", save_last=True
)
trainer = pl.Trainer(logger=False, devices=1, max_epochs=3, callbacks=[saves], **QUIET)
trainer.fit(model, train_loader, loader)
report("fit", trainer.callback_metrics["val_loss"])
tested = trainer.test(model, loader, verbose=False, weights_only=False)[0]
report("test", [tested[name] for name in sorted(tested)])
report("predict", torch.cat(trainer.predict(model, loader)))
loaded = models.MPNN.load_from_checkpoint(saves.best_model_path)
report("load", sum(p.double().sum() for p in loaded.parameters()))
models.save_model("model.pt", loaded)
again = models.load_model("model.pt")
report("its own file", sum(p.double().sum() for p in again.parameters()))
