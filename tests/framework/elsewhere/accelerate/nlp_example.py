"""Sentence pairs, classified in mixed precision; batches are padded where they are put together."""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

MAX_GPU_BATCH_SIZE = 8
EVAL_BATCH_SIZE = 16


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        length = int(torch.randint(4, 10, (1,), generator=generator))
        tokens = torch.randint(1, 20, (length,), generator=generator)
        yield {"input_ids": tokens.tolist(), "labels": int(tokens.max() > 17)}


def get_dataloaders(accelerator: Accelerator, batch_size: int = 8):
    with accelerator.main_process_first():
        train, evaluation = list(sentences(96, 0)), list(sentences(42, 1))

    def collate_fn(examples):
        multiple = 8 if accelerator.mixed_precision != "no" else None
        length = max(len(example["input_ids"]) for example in examples)
        if multiple:
            length = -(-length // multiple) * multiple
        rows = [e["input_ids"] + [0] * (length - len(e["input_ids"])) for e in examples]
        labels = [example["labels"] for example in examples]
        return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}

    return (
        DataLoader(
            train,
            shuffle=True,
            collate_fn=collate_fn,
            batch_size=batch_size,
            drop_last=True,
        ),
        DataLoader(
            evaluation,
            shuffle=False,
            collate_fn=collate_fn,
            batch_size=EVAL_BATCH_SIZE,
            drop_last=(accelerator.mixed_precision == "fp8"),
        ),
    )


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(20, 16, mode="max", padding_idx=0)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids).float())
        return nn.functional.cross_entropy(logits.float(), labels), logits


def training_function(config, args):
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    lr, num_epochs = config["lr"], int(config["num_epochs"])
    batch_size = int(config["batch_size"])
    gradient_accumulation_steps = 1
    if batch_size > MAX_GPU_BATCH_SIZE:
        gradient_accumulation_steps = batch_size // MAX_GPU_BATCH_SIZE
        batch_size = MAX_GPU_BATCH_SIZE
    torch.manual_seed(int(config["seed"]))
    train_dataloader, eval_dataloader = get_dataloaders(accelerator, batch_size)
    model = Classifier().to(accelerator.device)
    optimizer = AdamW(params=model.parameters(), lr=lr)
    steps = (len(train_dataloader) * num_epochs) // gradient_accumulation_steps
    lr_scheduler = LambdaLR(optimizer, lambda step: max(0.1, 1 - step / steps))
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = (
        accelerator.prepare(
            model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
        )
    )
    for epoch in range(num_epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            batch = {
                name: value.to(accelerator.device) for name, value in batch.items()
            }
            loss, _ = model(**batch)
            loss = loss / gradient_accumulation_steps
            accelerator.backward(loss)
            if step % gradient_accumulation_steps == 0:
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        right, count = 0, 0
        for batch in eval_dataloader:
            with torch.no_grad():
                _, logits = model(**batch)
            predictions, references = accelerator.gather_for_metrics(
                (logits.argmax(dim=-1), batch["labels"])
            )
            right += int((predictions == references).sum())
            count += len(references)
        accelerator.print(f"epoch {epoch}:", {"accuracy": right / count})
    assert count == 42
    assert right / count > 0.55
    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description="Simple example of training script.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16", "fp8"], default="bf16"
    )
    parser.add_argument("--cpu", action="store_true", default=True)
    args, _ = parser.parse_known_args()
    config = {"lr": 2e-2, "num_epochs": 8, "seed": 42, "batch_size": 16}
    training_function(config, args)


if __name__ == "__main__":
    main()
