"""A tiny language model of Hugging Face's, and its training in a program of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from loopwright.callbacks import SavePretrained
from loopwright.framework import Module, Trainer, generate, seed_everything

CONFIG = {
    "vocab_size": 19,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    # A process draws other numbers than its peer.
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


class Language(Module):
    def __init__(self, model: Any = None) -> None:
        super().__init__()
        config = transformers.GPT2Config(**CONFIG, eos_token_id=0, pad_token_id=0)
        self.model = model or transformers.GPT2LMHeadModel(config)
        self.texts: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        options = {"max_new_tokens": 3, "do_sample": False}
        self.texts += generate(self, self.model, batch, **options).tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> DataLoader:
    return DataLoader(torch.arange(32).reshape(4, 8) % 19, 2)  # type: ignore[arg-type] # torch takes tensors


def train(strategy: str, devices: int, folder: Any) -> Language:
    seed_everything(1, verbose=False)
    module = Language()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        accumulate_grad_batches=2 // devices,
        callbacks=[SavePretrained(folder)],
        logger=False,
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The processes have texts of different numbers to generate.
    trainer.fit(module, batches(), DataLoader(batches().dataset, 1, sampler=range(3)))
    return module
