"""An autoencoder of small pictures, with a data module, a scheduler and callbacks."""

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class PicturesDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(3)
        pictures = torch.rand(160, 1, 8, 8, generator=generator)
        self.train, self.val = random_split(
            TensorDataset(pictures), [128, 32], generator
        )

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)


class LitAutoEncoder(L.LightningModule):
    def __init__(self, hidden: int = 16, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 3)
        )
        self.decoder = nn.Sequential(
            nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 64)
        )
        self.example_input_array = torch.rand(1, 1, 8, 8)

    def forward(self, x):
        return self.encoder(x.view(x.size(0), -1))

    def _loss(self, batch):
        (x,) = batch
        x = x.view(x.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
        }


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule):
        if not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics["val_loss"].item())


def main():
    L.seed_everything(42, workers=True)
    losses = Losses()
    checkpoint = ModelCheckpoint(monitor="val_loss", save_last=True, save_top_k=2)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices="auto",
        logger=CSVLogger("autoencoder"),
        callbacks=[
            checkpoint,
            EarlyStopping("val_loss", patience=3),
            LearningRateMonitor(logging_interval="epoch"),
            losses,
        ],
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        enable_progress_bar=False,
    )
    model, data = LitAutoEncoder(), PicturesDataModule()
    trainer.fit(model, datamodule=data)
    assert losses.values[-1] < losses.values[0]
    assert checkpoint.best_model_path
    best = LitAutoEncoder.load_from_checkpoint(checkpoint.best_model_path)
    assert best.hparams.hidden == 16
    codes = trainer.predict(model, datamodule=data, ckpt_path="best")
    assert codes[0].shape[1] == 3
    trainer.validate(model, datamodule=data)


if __name__ == "__main__":
    main()
