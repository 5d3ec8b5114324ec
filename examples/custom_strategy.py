"""Local SGD as a strategy of one's own: processes train apart, and average their parameters every few steps.

`python examples/custom_strategy.py` trains a small network on scikit-learn's digits in two processes. DDP averages
gradients in every step; local SGD (Stich, 2019, https://arxiv.org/abs/1805.09767) communicates a tenth of that. What it
needs of the framework is in `strategies/base.py`, and nothing else was read for it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from loopwright.framework import Module, Trainer, seed_everything
from loopwright.strategies import Precision, Strategy

ENOUGH = 0.9  # the accuracy to reach


class LocalSGDStrategy(Strategy):
    """Trains a replica in each process by itself, and averages parameters every ``sync_every`` steps.

    They are averaged before an evaluation and at the end, too: what is evaluated and exported is the mean. The
    optimizer's states stay each process's own, and a checkpoint holds those of the main one.

    Args:
        sync_every: steps between two averages.
    """

    name = "local_sgd"

    def __init__(self, sync_every: int = 10) -> None:
        self.sync_every = sync_every
        self.num_steps = 0
        self.num_averages = 0

    def setup(self, module: nn.Module, precision: Precision) -> nn.Module:
        super().setup(module, precision)
        self.group.broadcast_tensors([*module.parameters(), *module.buffers()])
        return module

    # A training step is a call of the bare module, as one of an evaluation is: its gradients stay in this process.
    forward = Strategy.evaluate

    def step(self, optimizer: Optimizer) -> None:
        super().step(optimizer)
        self.num_steps += 1
        if self.num_steps % self.sync_every == 0:
            self.average_parameters()

    def average_parameters(self) -> None:
        """Give all processes the mean of their parameters: one collective."""
        parameters = list(self.module.parameters())
        flat = nn.utils.parameters_to_vector(parameters)
        nn.utils.vector_to_parameters(self.group.reduce(flat, "mean"), parameters)
        self.num_averages += 1

    def start_evaluation(self) -> None:
        self.average_parameters()

    def teardown(self, interrupted: bool = False) -> None:
        if not interrupted:
            self.average_parameters()


class Classifier(Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on handwritten digits.")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--sync-every", type=int, default=10)
    args = parser.parse_args()

    seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16  # (1797, 64)
    samples = TensorDataset(images, torch.tensor(digits))
    train, test = torch.utils.data.random_split(samples, [1500, 297])
    strategy = LocalSGDStrategy(args.sync_every)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))
    averages = strategy.num_averages
    (result,) = trainer.test(model, DataLoader(test, batch_size=64), verbose=False)

    # (processes, parameters)
    replicas = trainer.strategy.all_gather(
        nn.utils.parameters_to_vector(model.parameters()).detach()
    )
    if trainer.is_global_zero:
        differ = bool((replicas != replicas[0]).any()) if args.devices > 1 else False
        print(f"Parameters averaged {averages} times in {strategy.num_steps} steps")
        print(f"Replicas differ     {differ}")
        print(f"Test accuracy       {result['accuracy']:.4f}")
    if result["accuracy"] < ENOUGH:
        print(f"The test accuracy is below {ENOUGH}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
