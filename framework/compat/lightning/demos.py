"""Lightning's small models for trying things out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .core import LightningDataModule, LightningModule

__all__ = [
    "BoringDataModule",
    "BoringDataModuleNoLen",
    "BoringModel",
    "DemoModel",
    "IterableBoringDataModule",
    "ManualOptimBoringModel",
    "RandomDataset",
    "RandomDictDataset",
    "RandomIterableDataset",
    "RandomIterableDatasetWithLen",
]


class RandomDataset(Dataset[Tensor]):
    """Samples of random numbers.

    Args:
        size: numbers in a sample.
        length: number of samples.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(RandomDataset):
    """The same in dicts, as ``"a"`` and ``"b"``."""

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        return {"a": sample, "b": sample + 1}


class RandomIterableDataset(IterableDataset[Tensor]):
    """A stream of random samples.

    Args:
        size: numbers in a sample.
        count: number of samples.
    """

    def __init__(self, size: int, count: int) -> None:
        self.count = count
        self.size = size

    def __iter__(self) -> Any:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """The same, which tells how many there are."""

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """A linear layer that learns to return ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to samples of shape ``(N, 32)``."""
        return self.layer(x)

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared difference to the labels, or to ones."""
        target = torch.ones_like(preds) if labels is None else labels
        return nn.functional.mse_loss(preds, target)

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch, in a dict."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch, as ``"x"``."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch, as ``"y"``."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> Any:
        """SGD, and a schedule by epochs."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> Any:
        """64 random samples."""
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self) -> Any:
        """64 random samples."""
        return DataLoader(RandomDataset(32, 64))

    def test_dataloader(self) -> Any:
        """64 random samples."""
        return DataLoader(RandomDataset(32, 64))

    def predict_dataloader(self) -> Any:
        """64 random samples."""
        return DataLoader(RandomDataset(32, 64))


class ManualOptimBoringModel(BoringModel):
    """The same with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Train on a batch."""
        optimizer = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class BoringDataModule(LightningDataModule):
    """64 random samples for each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.dataset_cls = RandomDataset

    def setup(self, stage: str) -> None:
        """Make the samples."""
        self.random_full = RandomDataset(32, 64 * 4)
        parts = [
            torch.utils.data.Subset(self.random_full, range(begin, begin + 64))
            for begin in range(0, 64 * 4, 64)
        ]
        self.random_train, self.random_val, self.random_test, self.random_predict = (
            parts
        )

    def train_dataloader(self) -> Any:
        """Samples to train on."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> Any:
        """Samples to validate on."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> Any:
        """Samples to test on."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> Any:
        """Samples to predict."""
        return DataLoader(self.random_predict)


class _ByStage(LightningDataModule):
    """Loaders of what a stage's datasets are."""

    def __init__(self) -> None:
        super().__init__()
        self._datasets: dict[str, Any] = {}

    def train_dataloader(self) -> Any:
        """What to train on."""
        return _loaders(self._datasets["train"])

    def val_dataloader(self) -> Any:
        """What to validate on."""
        return _loaders(self._datasets["val"])

    def test_dataloader(self) -> Any:
        """What to test on."""
        return _loaders(self._datasets["test"])

    def predict_dataloader(self) -> Any:
        """What to predict."""
        return _loaders(self._datasets["predict"])


def _loaders(datasets: Any) -> Any:
    if isinstance(datasets, list):
        return [DataLoader(dataset) for dataset in datasets]
    return DataLoader(datasets)


class BoringDataModuleNoLen(_ByStage):
    """A stream of random samples for each stage, which does not tell how many there are."""

    def setup(self, stage: str) -> None:
        """Make the streams."""
        counts = {"train": 512, "val": 128, "test": 256, "predict": 64}
        self._datasets = {
            part: RandomIterableDataset(32, count) for part, count in counts.items()
        }


class IterableBoringDataModule(_ByStage):
    """For each stage a list of two: samples, and a stream of them."""

    def setup(self, stage: str) -> None:
        """Make samples and streams."""
        counts = {"train": 16, "val": 32, "test": 64, "predict": 128}
        self._datasets = {
            part: [RandomDataset(4, count), RandomIterableDataset(4, count)]
            for part, count in counts.items()
        }


class DemoModel(LightningModule):
    """A linear layer with a bit more to configure.

    Args:
        out_dim: width of its output.
        learning_rate: of Adam.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(32, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to samples, flattened."""
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The sum of the outputs."""
        return self(batch).sum()

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
