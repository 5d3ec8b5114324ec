"""Train a small convolutional network on scikit-learn's handwritten digits.

`make demo` runs it, or `python examples/digits.py`. The 1,797 images of 8 x 8 pixels come with scikit-learn, so nothing
is downloaded. It takes about ten seconds on two CPU cores. It ends with status 1 if the test accuracy is below 0.97.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from loopwright.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from loopwright.framework import DataModule, Module, Trainer, seed_everything
from loopwright.loggers import TensorBoardLogger

ENOUGH = 0.97  # the test accuracy to reach


class Images(Dataset):
    """Images and labels; with `shift`, each image is moved by up to one pixel each time it is read."""

    def __init__(self, images: Tensor, labels: Tensor, shift: bool = False) -> None:
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]  # (1, 8, 8)
        if self.shift:
            row, column = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, row : row + 8, column : column + 8]
        return image, self.labels[index]


class Digits(DataModule):
    """1,257 images to train on, 270 to validate and 270 to test: always the same ones, whatever the run's seed."""

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32) / 16  # from 0 to 1
        images = images.view(-1, 1, 8, 8)  # 1797 of them
        labels = torch.tensor(digits)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, val, test = order.split([1257, 270, 270])
        self.train = Images(images[train], labels[train], shift=True)
        self.val = Images(images[val], labels[val])
        self.test = Images(images[test], labels[test])

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.test)

    def loader(self, images: Images, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            images,
            self.hparams.batch_size,
            shuffle=shuffle,
            num_workers=self.hparams.num_workers,
        )


class ConvNet(Module):
    """Three convolutions and a linear layer."""

    def __init__(self, channels: int = 32, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # for the loggers, and so that load_from_checkpoint can construct it again
        self.example_input_array = torch.zeros(
            1, 1, 8, 8
        )  # gives the model's summary its sizes
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * channels * 2 * 2, 10),
        )  # fmt: skip
        self.train_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.01
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.learning_rate, total_steps=steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network on handwritten digits."
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=25,
        help="train at most so many epochs (default: 25)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, data order and augmentation (default: 0)",
    )
    parser.add_argument(
        "--dir", default="logs", help="where curves and checkpoints go (default: logs)"
    )
    args = parser.parse_args()

    seed_everything(args.seed)
    model, data = ConvNet(), Digits()
    checkpoints = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_acc:.3f}")
    logger = TensorBoardLogger(args.dir, name="digits")
    trainer = Trainer(
        max_epochs=args.epochs,
        logger=logger,
        callbacks=[
            checkpoints,
            EarlyStopping(monitor="val_loss", patience=8),
            LearningRateMonitor(logging_interval="step"),
            RichProgressBar(),
        ],
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, ckpt_path="best")

    accuracy, best = result["test_acc"], checkpoints.best_model_path
    print(f"Test accuracy   {accuracy:.4f}")
    print(f"Curves          {trainer.log_dir}")
    print(f"  to see them   tensorboard --logdir {logger.root_dir}")
    print(f"Best model      {best}")
    print(f"  to load it    model = ConvNet.load_from_checkpoint({best!r})")
    if accuracy < ENOUGH:
        print(f"The test accuracy is below {ENOUGH}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
