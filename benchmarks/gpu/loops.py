"""The same work for everybody on the device: one function for each contender."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..contenders import LOG_EVERY
from .device import DEVICE, IS_REHEARSAL

# Of "32-true" there is none.
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
ACCELERATE = {"16-mixed": "fp16", "bf16-mixed": "bf16", "32-true": "no"}


@dataclass(frozen=True)
class Work:
    """What to run: one epoch.

    Attributes:
        module: makes the user's module on a contender's base class.
        data: makes a loader.
        precision: as the Trainer calls it.
        full: with TensorBoard, progress bar and checkpoints, and a value logged in each step; else with none.
        compiled: what torch.compile is given: "" for nothing; "network", the user's network as a whole, or in the
            Trainer its parts; "step", the whole step.
        folder: for logs and checkpoints.
    """

    module: Callable[[type], Any]
    data: Callable[[], Iterable[Any]]
    precision: str
    full: bool
    compiled: str
    folder: str


class Plain(nn.Module):
    """For contenders without a module class of their own. Their loops log what the step returns."""

    training_step: Callable[..., Any]

    def forward(self, batch: Any, batch_idx: int) -> Any:
        return self.training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def log(self, name: str, value: torch.Tensor, prog_bar: bool = False) -> None:
        pass


def run_raw(work: Work) -> None:
    """The loop that anybody would write. It shows and saves nothing, whatever the work says."""
    module = work.module(Plain).to(DEVICE)
    optimizer = module.configure_optimizers()
    loss_of, step = module.training_step, optimizer.step
    if work.compiled == "network":
        module.network.compile()
    elif work.compiled == "step":
        loss_of, step = torch.compile(loss_of), torch.compile(step)
    dtype = AUTOCAST.get(work.precision)
    # One that does nothing would cost microseconds, which nobody spends who has no use for it.
    scaler = torch.amp.GradScaler(DEVICE.type) if dtype is torch.float16 else None
    for batch_idx, batch in enumerate(work.data()):
        batch = [part.to(DEVICE, non_blocking=True) for part in batch]
        module.on_train_batch_start(batch, batch_idx)
        with nullcontext() if dtype is None else torch.autocast(DEVICE.type, dtype):
            loss = loss_of(batch, batch_idx)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def run_loopwright(work: Work) -> None:
    from loopwright.framework import Module, Trainer

    how: dict[str, Any] = {"": False, "network": True, "step": "step"}
    Trainer(compile=how[work.compiled], **trainer_options(work)).fit(
        work.module(Module), work.data()
    )


def run_lightning(work: Work) -> None:
    from lightning.pytorch import LightningModule, Trainer

    module = work.module(LightningModule)
    if work.compiled:
        module.network.compile()
    Trainer(**trainer_options(work)).fit(module, work.data())


def trainer_options(work: Work) -> dict[str, Any]:
    """What both Trainers are told, in the same words."""
    extent: dict[str, Any] = (
        {"default_root_dir": work.folder} if work.full else {"barebones": True}
    )
    accelerator = "cpu" if IS_REHEARSAL else "gpu"
    return {
        "accelerator": accelerator, "devices": 1, "max_epochs": 1, "precision": work.precision, **extent,
    }  # fmt: skip


def run_accelerate(work: Work) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration
    from tqdm import tqdm

    accelerator = Accelerator(
        cpu=IS_REHEARSAL,
        mixed_precision=ACCELERATE[work.precision],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with="tensorboard" if work.full else None,
        project_dir=work.folder,
    )
    accelerator.init_trackers("benchmark")
    module = work.module(Plain)
    hook = module.on_train_batch_start
    if work.compiled:
        module.network.compile()
    module, optimizer, batches = accelerator.prepare(
        module, module.configure_optimizers(), work.data()
    )
    bar = batches = tqdm(batches) if work.full else batches
    for batch_idx, batch in enumerate(batches):
        hook(batch, batch_idx)
        loss = module(batch, batch_idx)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if work.full and (batch_idx + 1) % LOG_EVERY == 0:
            value = loss.item()
            accelerator.log({"loss": value}, step=batch_idx + 1)
            bar.set_postfix(loss=value, refresh=False)
    accelerator.end_training()
    accelerator.free_memory()


RUN: dict[str, Callable[[Work], None]] = {
    "raw": run_raw,
    "loopwright": run_loopwright,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
}
