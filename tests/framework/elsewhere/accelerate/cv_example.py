"""Pictures, a frozen trunk and a one-cycle schedule."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset


class PetsDataset(Dataset):
    def __init__(self, count):
        generator = np.random.default_rng(count)
        self.labels = generator.integers(0, 3, count)
        self.pictures = generator.normal(size=(count, 3, 8, 8)).astype(np.float32)
        for picture, label in zip(self.pictures, self.labels, strict=True):
            picture[label] += 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.pictures[index], "label": self.labels[index]}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.norm(self.trunk(x)).relu().mean((2, 3)))

    def get_classifier(self):
        return self.classifier


def training_function(config):
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    set_seed(config["seed"])
    train_dataloader = DataLoader(
        PetsDataset(96), shuffle=True, batch_size=config["batch_size"]
    )
    eval_dataloader = DataLoader(PetsDataset(50), batch_size=config["batch_size"])
    model = Network()
    model = model.to(accelerator.device)
    for param in model.parameters():
        param.requires_grad = False
    for param in model.get_classifier().parameters():
        param.requires_grad = True
    optimizer = torch.optim.Adam(
        params=model.get_classifier().parameters(), lr=config["lr"] / 25
    )
    lr_scheduler = OneCycleLR(
        optimizer=optimizer,
        max_lr=config["lr"],
        epochs=config["num_epochs"],
        steps_per_epoch=len(train_dataloader),
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = (
        accelerator.prepare(
            model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
        )
    )
    for _ in range(config["num_epochs"]):
        model.train()
        for batch in train_dataloader:
            batch = {k: v.to(accelerator.device) for k, v in batch.items()}
            outputs = model(batch["image"])
            loss = torch.nn.functional.cross_entropy(outputs, batch["label"])
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        model.eval()
        accurate = 0
        num_elems = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(batch["image"])
            predictions = outputs.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics(
                (predictions, batch["label"])
            )
            accurate_preds = predictions == references
            num_elems += accurate_preds.shape[0]
            accurate += accurate_preds.long().sum()
        metric = accurate.item() / num_elems
        accelerator.print(f"accuracy {100 * metric:.2f}")
    assert num_elems == 50
    assert metric > 0.4
    assert accelerator.unwrap_model(model).get_classifier() is not None


if __name__ == "__main__":
    training_function({"lr": 0.3, "num_epochs": 4, "seed": 1, "batch_size": 8})
