"""Collective variables: fit with early stopping, an autoencoder, TorchScript."""

import lightning
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping
from mlcolvar.cvs import AutoEncoderCV, DeepTDA
from mlcolvar.data import DictDataset, DictModule
from reporting import QUIET, report, seed

seed()
samples = torch.randn(200, 4)
samples[1::2] += 2
labels = torch.zeros(200)
labels[1::2] = 1
in_order = {
    "lengths": [0.8, 0.2],
    "batch_size": 40,
    "shuffle": False,
    "random_split": False,
}
seed()
states = DeepTDA(
    2, 1, target_centers=[-7, 7], target_sigmas=[0.2, 0.2], layers=[4, 8, 1]
)
callbacks = [EarlyStopping("valid_loss")]
trainer = lightning.Trainer(
    max_epochs=3, logger=False, enable_checkpointing=False, callbacks=callbacks, **QUIET
)
trainer.fit(
    states, DictModule(DictDataset({"data": samples, "labels": labels}), **in_order)
)
report("fit", trainer.callback_metrics["valid_loss"])
seed()
encoder = AutoEncoderCV([4, 6, 1])
trainer = lightning.Trainer(max_epochs=2, logger=False, **QUIET)
trainer.fit(encoder, DictModule(DictDataset({"data": samples}), **in_order))
report("fit again", trainer.callback_metrics["valid_loss"])
states.to_torchscript("states.ptc", method="trace")
report("torchscript", torch.jit.load("states.ptc")(samples))
