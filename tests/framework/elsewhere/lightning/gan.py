"""Two networks that play against each other, with manual optimization."""

import os
from argparse import ArgumentParser, Namespace

import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytorch_lightning.callbacks import Timer
from torch.utils.data import DataLoader, TensorDataset


class Generator(nn.Module):
    def __init__(self, latent_dim: int = 4, size: int = 6):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_dim, 16), nn.LeakyReLU(0.2), nn.Linear(16, size), nn.Tanh()
        )

    def forward(self, z):
        return self.model(z)


class Discriminator(nn.Module):
    def __init__(self, size: int = 6):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(size, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)
        )

    def forward(self, x):
        return self.model(x)


class GAN(pl.LightningModule):
    def __init__(self, lr: float = 2e-3, b1: float = 0.5, latent_dim: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(latent_dim)
        self.discriminator = Discriminator()

    def forward(self, z):
        return self.generator(z)

    @staticmethod
    def adversarial_loss(y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch):
        (samples,) = batch
        opt_g, opt_d = self.optimizers()
        real = torch.ones(samples.size(0), 1).type_as(samples)
        fake = torch.zeros(samples.size(0), 1).type_as(samples)
        z = torch.randn(samples.shape[0], self.hparams.latent_dim).type_as(samples)

        self.toggle_optimizer(opt_g)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), real)
        self.log("g_loss", g_loss, prog_bar=True)
        opt_g.zero_grad()
        self.manual_backward(g_loss)
        opt_g.step()
        self.untoggle_optimizer(opt_g)

        self.toggle_optimizer(opt_d)
        real_loss = self.adversarial_loss(self.discriminator(samples), real)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        opt_d.step()
        self.untoggle_optimizer(opt_d)

    def configure_optimizers(self):
        betas = (self.hparams.b1, 0.999)
        opt_g = torch.optim.Adam(
            self.generator.parameters(), self.hparams.lr, betas=betas
        )
        opt_d = torch.optim.Adam(
            self.discriminator.parameters(), self.hparams.lr, betas=betas
        )
        schedulers = [torch.optim.lr_scheduler.StepLR(opt_d, step_size=20)]
        return [opt_g, opt_d], schedulers

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def main(args: Namespace) -> None:
    pl.seed_everything(7)
    model = GAN(lr=args.lr, latent_dim=args.latent_dim)
    data = TensorDataset(torch.randn(64, 6).tanh())
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy="ddp_find_unused_parameters_true" if several else "auto",
        callbacks=[Timer()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=8))
    assert {"g_loss", "d_loss"} <= trainer.callback_metrics.keys()
    assert model(torch.randn(2, args.latent_dim)).shape == (2, 6)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--latent_dim", type=int, default=4)
    main(parser.parse_known_args()[0])
