"""A program in the words of Lightning 1."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.base import Callback
from pytorch_lightning.core.lightning import LightningModule
from pytorch_lightning.utilities.distributed import rank_zero_only
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Says(Callback):
    @rank_zero_only
    def on_train_end(self, trainer, pl_module):
        print("steps", trainer.global_step)


if __name__ == "__main__":
    trainer = pl.Trainer(
        gpus=0,
        max_epochs=1,
        logger=False,
        checkpoint_callback=False,
        weights_summary=None,
        progress_bar_refresh_rate=0,
        callbacks=[Says()],
    )
    trainer.fit(Net(), train_dataloader=DataLoader(torch.randn(8, 2), batch_size=2))
