"""A small language model, in half precision, with schedules by step, accumulation and a resumed run."""

import math

import lightning.pytorch as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader, Dataset


class Text(Dataset):
    def __init__(self, block_size: int = 12, length: int = 600):
        tokens = torch.arange(length) ** 2 % 17
        self.blocks = tokens.unfold(0, block_size + 1, block_size)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        block = self.blocks[index]
        return block[:-1], block[1:]


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)
        self.scale = math.sqrt(width)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        hidden = self.embedding(tokens) * self.scale
        return self.head(self.encoder(hidden, mask=mask.to(hidden), is_causal=True))


class LanguageModel(pl.LightningModule):
    def __init__(self, vocab_size: int = 17):
        super().__init__()
        self.save_hyperparameters()
        self.model = Transformer(vocab_size)

    def _step(self, batch):
        tokens, target = batch
        logits = self.model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def training_step(self, batch, batch_idx):
        loss = self._step(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._step(batch), prog_bar=True)

    def on_before_optimizer_step(self, optimizer):
        norms = pl.utilities.grad_norm(self.model, norm_type=2)
        self.log_dict(norms)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@rank_zero_only
def say(text):
    rank_zero_info(text)


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        default_root_dir="transformer",
        callbacks=[pl.callbacks.ModelCheckpoint(save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


if __name__ == "__main__":
    pl.seed_everything(1)
    train = DataLoader(Text(), batch_size=5, shuffle=True)
    val = DataLoader(Text(length=200), batch_size=5)
    first = trainer(1)
    first.fit(LanguageModel(), train, val)
    say(f"val_loss {first.callback_metrics['val_loss']:.3f}")
    checkpoint = first.checkpoint_callback.last_model_path
    second = trainer(3)
    model = LanguageModel()
    second.fit(model, train, val, ckpt_path=checkpoint)
    assert second.current_epoch == 3
    assert second.callback_metrics["val_loss"] < first.callback_metrics["val_loss"]
