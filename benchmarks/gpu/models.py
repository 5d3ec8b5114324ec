"""The user's code, to be mixed into each contender's own kind of module; and the data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .device import DEVICE, IS_REHEARSAL

Look = Callable[[int], None]  # gets the index of a batch that is about to be trained on


class Steps:
    """What all models share.

    The clock is read in a hook and not in the step, as a step that is compiled cannot read it.

    Args:
        look: called before each step.
        full: whether to log the loss of each step, and to show it in the bar.
    """

    network: nn.Module
    log: Callable[..., Any]

    def __init__(self, look: Look, full: bool) -> None:
        super().__init__()
        self.look = look
        self.full = full

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look(batch_idx)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.full:
            self.log("loss", loss, prog_bar=True)
        return loss


# -- a language model in the shape of GPT-2 small ---------------------------------------------------------------


@dataclass(frozen=True)
class LanguageShape:
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int  # tokens in a sequence
    batch: int  # sequences

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch * self.length

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of width {self.width} with {self.heads} heads, {self.vocabulary} tokens, batches of "
            f"{self.batch} sequences of {self.length}"
        )


GPT2 = LanguageShape(12, 768, 12, 50257, 1024, 8)
TINY_GPT2 = LanguageShape(2, 32, 2, 100, 16, 2)
LANGUAGE = TINY_GPT2 if IS_REHEARSAL else GPT2


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_layers = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        projected = self.queries_keys_values(self.before_attention(x))
        # (3, batch, heads, time, width of a head)
        parts = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts
        seen = nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True
        )
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.layers(self.before_layers(x))


class LanguageNetwork(nn.Module):
    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads) for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time)
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (batch, time, vocabulary)


class LanguageModel(Steps):
    def __init__(self, look: Look, full: bool) -> None:
        super().__init__(look, full)
        self.network = LanguageNetwork(LANGUAGE)

    def loss(self, batch: Any) -> Tensor:
        tokens, following = batch  # (batch, time) each
        logits = self.network(tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        return torch.optim.AdamW(parameters, lr=1e-4, fused=not IS_REHEARSAL)


def token_loader(steps: int) -> DataLoader[Any]:
    size = (LANGUAGE.batch * steps, LANGUAGE.length)
    tokens = torch.randint(LANGUAGE.vocabulary, size)
    following = torch.randint(LANGUAGE.vocabulary, size)
    data = TensorDataset(tokens, following)
    return DataLoader(data, LANGUAGE.batch, pin_memory=not IS_REHEARSAL)


# -- a network for images in the shape of ResNet-50 ---------------------------------------------------------------


@dataclass(frozen=True)
class ImageShape:
    blocks: tuple[int, ...]  # in each stage
    width: int  # channels of the first convolution
    classes: int
    size: int  # pixels, of both sides
    batch: int  # images
    images: int  # different ones

    @property
    def bytes(self) -> int:
        """Of a batch."""
        return self.batch * 3 * self.size**2

    def __str__(self) -> str:
        return f"Batches of {self.batch} images of {self.size} × {self.size}"


RESNET50 = ImageShape((3, 4, 6, 3), 64, 1000, 224, 128, 1024)
TINY_RESNET = ImageShape((1, 1), 8, 10, 32, 4, 16)
PICTURES = TINY_RESNET if IS_REHEARSAL else RESNET50


def convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(after),
    )


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.layers = nn.Sequential(
            convolution(before, width, 1),
            nn.ReLU(inplace=True),
            convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            convolution(width, after, 1),
        )
        is_same = before == after and stride == 1
        self.shortcut = nn.Identity() if is_same else convolution(before, after, 1, stride)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.layers(x) + self.shortcut(x))


def image_network(shape: ImageShape) -> nn.Sequential:
    channels = shape.width
    layers: list[nn.Module] = [
        convolution(3, channels, 7, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    for stage, count in enumerate(shape.blocks):
        width = shape.width * 2**stage
        for at in range(count):
            stride = 2 if stage > 0 and at == 0 else 1
            layers.append(Bottleneck(channels, width, stride))
            channels = 4 * width
    head = (
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, shape.classes),
    )
    return nn.Sequential(*layers, *head)


class ImageModel(Steps):
    def __init__(self, look: Look, full: bool) -> None:
        super().__init__(look, full)
        network: Any = image_network(PICTURES)
        self.network = network.to(memory_format=torch.channels_last)

    def loss(self, batch: Any) -> Tensor:
        pixels, classes = batch  # (batch, 3, height, width) of bytes, (batch,)
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        return nn.functional.cross_entropy(self.network(images / 255), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)


class Images(Dataset[Any]):
    """Random bytes in memory; the same images come again and again.

    Args:
        length: how many an epoch has.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        shape = (PICTURES.images, 3, PICTURES.size, PICTURES.size)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8)
        self.classes = torch.randint(PICTURES.classes, (PICTURES.images,))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        at = index % PICTURES.images
        return self.pixels[at], self.classes[at]


def count_workers() -> int:
    """As many as there are cores for, and shared memory for their batches, of which containers have little."""
    if IS_REHEARSAL:
        return 1
    cores = len(os.sched_getaffinity(0))
    # A worker has two batches ready, and there is one more on its way.
    fitting = shutil.disk_usage("/dev/shm").free // (4 * PICTURES.bytes)
    return max(0, min(8, cores - 1, fitting))


def image_loader(steps: int) -> DataLoader[Any]:
    return DataLoader(
        Images(PICTURES.batch * steps),
        PICTURES.batch,
        num_workers=count_workers(),
        pin_memory=not IS_REHEARSAL,
    )


def repeated_images(steps: int) -> list[Any]:
    """One batch, which is on the device already, again and again."""
    images = Images(PICTURES.batch)
    batch = [
        images.pixels[: PICTURES.batch].to(DEVICE),
        images.classes[: PICTURES.batch].to(DEVICE),
    ]
    return [batch] * steps


# -- a model so small that all time is the loop's -------------------------------------------------------------------


class SmallModel(Steps):
    def __init__(self, look: Look, full: bool) -> None:
        super().__init__(look, full)
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.01)


def small_loader(steps: int) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(4 * steps, 32), torch.randn(4 * steps, 2))
    return DataLoader(data, 4, pin_memory=not IS_REHEARSAL)
