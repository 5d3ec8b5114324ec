"""Programs in the style of Accelerate's examples, on tiny models and made-up data; each returns its losses and metrics.

They import ``accelerate``, and run on it, or with ``--install`` on what stands for it::

    python accelerate_programs.py [--install] FOLDER OUTPUT.json [NAME ...]
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

if "--install" in sys.argv:
    import loopwright.accelerate

    sys.argv.remove("--install")
    loopwright.accelerate.install()

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches as skip
from accelerate.local_sgd import LocalSGD
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProfileKwargs,
    ProjectConfiguration,
    find_executable_batch_size,
    gather_object,
    set_seed,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

logger = get_logger(__name__)
Results = dict[str, Any]


class Sentences(Dataset):
    """Token ids of different lengths, and a label that follows from them."""

    def __init__(self, count: int = 70) -> None:
        numbers = torch.Generator().manual_seed(5)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(3, 9, (1,), generator=numbers))
            ids = torch.randint(1, 30, (length,), generator=numbers)
            self.rows.append({"input_ids": ids, "labels": int(ids.sum() % 2)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def pad(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Any, labels: Any) -> Any:
        hidden = self.embedding(input_ids).mean(1)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def loaders(batch_size: int = 8) -> tuple[Any, Any]:
    train = DataLoader(Sentences(), batch_size, shuffle=True, collate_fn=pad)
    valid = DataLoader(Sentences(37), 16, collate_fn=pad)
    return train, valid


def linear_schedule(optimizer: Any, total: int) -> Any:
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))


def evaluate(accelerator: Any, model: Any, loader: Any) -> list[float]:
    model.eval()
    hits = []
    for batch in loader:
        with torch.no_grad():
            outputs = model(**batch)
        predictions, labels = accelerator.gather_for_metrics(
            (outputs["logits"].argmax(-1), batch["labels"])
        )
        hits.append((predictions == labels).float())
    joined = torch.cat(hits)
    return [len(joined), joined.mean().item()]


def mean_loss(accelerator: Any, losses: list[Any]) -> float:
    return accelerator.gather(torch.stack(losses)).mean().item()


def nlp_example(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True, mixed_precision="no")
    set_seed(42)
    train, valid = loaders()
    model = Classifier().to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = linear_schedule(optimizer, len(train) * 3 // 2)
    model, optimizer, train, valid, schedule = accelerator.prepare(
        model, optimizer, train, valid, schedule
    )
    found: Results = {"losses": [], "accuracy": [], "rates": []}
    for _ in range(3):
        model.train()
        losses = []
        for step, batch in enumerate(train):
            loss = model(**batch)["loss"] / 2
            losses.append(loss.detach())
            accelerator.backward(loss)
            if step % 2 == 0:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        found["losses"].append(mean_loss(accelerator, losses))
        found["accuracy"].append(evaluate(accelerator, model, valid))
        found["rates"].append(schedule.get_last_lr()[0])
    accelerator.wait_for_everyone()
    return found


class Images(Dataset):
    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> Any:
        numbers = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=numbers)
        return {"image": image, "label": index % 3}


def cv_example(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True, mixed_precision="bf16")
    set_seed(7)
    train = DataLoader(Images(), 4, shuffle=True)
    valid = DataLoader(Images(), 4)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3))
    model = nn.Sequential(body, head)
    for parameter in body[0].parameters():
        parameter.requires_grad = False
    mean = torch.zeros(1, 3, 1, 1).to(accelerator.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = OneCycleLR(optimizer, max_lr=1e-2, epochs=2, steps_per_epoch=len(train))
    model, optimizer, train, valid, schedule = accelerator.prepare(
        model, optimizer, train, valid, schedule
    )
    found: Results = {"losses": [], "hits": []}
    for _ in range(2):
        model.train()
        losses = []
        for batch in train:
            inputs = batch["image"] - mean
            loss = nn.functional.cross_entropy(model(inputs), batch["label"])
            losses.append(loss.detach())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found["losses"].append(mean_loss(accelerator, losses))
        model.eval()
        seen = hits = 0
        for batch in valid:
            with torch.no_grad():
                predictions = model(batch["image"] - mean).argmax(-1)
            predictions, labels = accelerator.gather_for_metrics(
                (predictions, batch["label"])
            )
            seen += len(labels)
            hits += int((predictions == labels).sum())
        found["hits"].append([seen, hits])
    found["rate"] = schedule.get_last_lr()
    accelerator.wait_for_everyone()
    return found


def complete_example(folder: Path) -> Results:
    """Checkpoints by steps, a tracker, and a second run that goes on inside an epoch, skipping batches by hand."""
    found: Results = {}

    def train_it(resume: str | None) -> list[float]:
        project = ProjectConfiguration(project_dir=str(folder / "complete"))
        accelerator: Any = Accelerator(
            cpu=True, log_with="tensorboard", project_config=project
        )
        set_seed(11)
        config = DataLoaderConfiguration(use_seedable_sampler=True)
        accelerator.dataloader_config = config
        train, valid = loaders(4)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = linear_schedule(optimizer, 40)
        model, optimizer, train, valid, schedule = accelerator.prepare(
            model, optimizer, train, valid, schedule
        )
        accelerator.init_trackers("complete", {"lr": 0.1, "seed": 11})
        first_epoch, skipped, overall = 0, 0, 0
        if resume is not None:
            accelerator.load_state(resume)
            overall = int(Path(resume).name.removeprefix("step_"))
            first_epoch, skipped = divmod(overall, len(train))
        losses = []
        accuracy = []
        for epoch in range(first_epoch, 2):
            model.train()
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            active = train
            if resume is not None and epoch == first_epoch and skipped:
                active = accelerator.skip_first_batches(train, skipped)
            for batch in active:
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                overall += 1
                losses.append(accelerator.gather(loss.detach()).mean().item())
                if overall == 6 and resume is None:
                    accelerator.save_state(str(folder / "complete" / "step_6"))
            accuracy = evaluate(accelerator, model, valid)
            accelerator.log({"accuracy": accuracy[1], "epoch": epoch}, step=overall)
        found["accuracy"] = accuracy
        accelerator.wait_for_everyone()
        return losses

    found["whole"] = train_it(None)
    found["resumed"] = train_it(str(folder / "complete" / "step_6"))
    found["goes on"] = found["whole"][6:] == found["resumed"]
    return found


def checkpointing(folder: Path) -> Results:
    """Names that count up, a limit, hooks, an object of the program's own, and the model in files of a limited size."""
    project = ProjectConfiguration(
        project_dir=str(folder / "project"),
        automatic_checkpoint_naming=True,
        total_limit=2,
    )
    accelerator: Any = Accelerator(cpu=True, project_config=project)
    set_seed(1)
    model, optimizer = nn.Linear(4, 2), None
    optimizer = torch.optim.Adam(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)

    class Count:
        value = 0

        def state_dict(self) -> Any:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["value"]

    count = Count()
    accelerator.register_for_checkpointing(count)
    calls = []
    accelerator.register_save_state_pre_hook(
        lambda models, weights, output: calls.append([len(models), len(weights)])
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: calls.append([len(models), Path(folder).name])
    )
    sums = []
    for number in range(3):
        loss = model(torch.ones(2, 4)).sum()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        count.value = number
        sums.append(sum(p.sum().item() for p in model.parameters()))
        accelerator.save_state()
    accelerator.wait_for_everyone()
    names = sorted(os.listdir(folder / "project" / "checkpoints"))
    accelerator.load_state(str(folder / "project" / "checkpoints" / names[0]))
    back = sum(p.sum().item() for p in model.parameters())
    accelerator.save_model(model, folder / "model", max_shard_size=32)
    accelerator.wait_for_everyone()
    files = sorted(os.listdir(folder / "model"))
    state = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    return {
        "names": names,
        "count": count.value,
        "calls": calls,
        "sums": sums,
        "back": back,
        "files": files,
        "state": sorted(state),
        "class": type(unwrapped).__name__,
    }


def gradient_accumulation(folder: Path) -> Results:
    found: Results = {}
    for name, plugin in (
        ("steps", GradientAccumulationPlugin(num_steps=3)),
        ("each", GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)),
        (
            "across",
            GradientAccumulationPlugin(
                num_steps=2, sync_with_dataloader=False, adjust_scheduler=True
            ),
        ),
    ):
        accelerator: Any = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        set_seed(3)
        train, _ = loaders(6)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        schedule = linear_schedule(optimizer, 30)
        model, optimizer, train, schedule = accelerator.prepare(
            model, optimizer, train, schedule
        )
        losses, syncs = [], []
        for _ in range(2):
            for batch in train:
                with accelerator.accumulate(model):
                    loss = model(**batch)["loss"]
                    losses.append(loss.detach())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                syncs.append(accelerator.sync_gradients)
        found[name] = [mean_loss(accelerator, losses), syncs, schedule.get_last_lr()]
    return found


def autoregressive(folder: Path) -> Results:
    """Windows that the program makes, whose loss is divided by the number of tokens of all processes."""
    steps = 2
    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    set_seed(9)
    train, _ = loaders(4)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    losses = []
    iterator = iter(train)
    for _ in range(math.ceil(len(train) / steps)):
        batches = [batch for _, batch in zip(range(steps), iterator, strict=False)]
        tokens = sum((batch["input_ids"] != 0).sum() for batch in batches)
        tokens = accelerator.gather(tokens).sum().item()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            several = accelerator.num_processes > 1
            with model.no_sync() if several and not last else contextlib.nullcontext():
                logits = model(**batch)["logits"]
                loss = nn.functional.cross_entropy(
                    logits, batch["labels"], reduction="sum"
                )
                loss = loss * steps * accelerator.num_processes / tokens
                accelerator.backward(loss)
                losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": mean_loss(accelerator, losses), "sum": total(model)}


def total(model: Any) -> float:
    return sum(p.detach().abs().sum().item() for p in model.parameters())


def cross_validation(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True)
    data = Sentences(48)
    tests = []
    for fold in range(2):
        set_seed(fold)
        chosen = [i for i in range(48) if i % 2 == fold]
        others = [i for i in range(48) if i % 2 != fold]
        train = DataLoader(Subset(data, others), 4, shuffle=True, collate_fn=pad)
        test = DataLoader(Subset(data, chosen), 5, collate_fn=pad)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, train, test = accelerator.prepare(
            model, optimizer, train, test
        )
        for batch in train:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        predictions = []
        for batch in test:
            with torch.no_grad():
                logits = model(**batch)["logits"]
            predictions.append(accelerator.gather_for_metrics(logits))
        tests.append(torch.cat(predictions).softmax(-1))
        accelerator.free_memory()
    joined = torch.stack(tests).mean(0)
    return {"shape": list(joined.shape), "sum": joined[:, 0].sum().item()}


def local_sgd(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True)
    set_seed(2)
    train, _ = loaders(5)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    losses = []
    with LocalSGD(
        accelerator=accelerator, model=model, local_sgd_steps=3, enabled=True
    ) as local:
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                losses.append(loss.detach())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                local.step()
    return {"loss": mean_loss(accelerator, losses), "sum": total(model)}


def memory(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True)
    sizes = []

    @find_executable_batch_size(starting_batch_size=16)
    def train_it(batch_size: int) -> float:
        accelerator.free_memory()
        sizes.append(batch_size)
        if batch_size > 12:
            raise RuntimeError("CUDA out of memory.")
        set_seed(4)
        train, _ = loaders(batch_size)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, train = accelerator.prepare(model, optimizer, train)
        for batch in train:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        return total(model)

    run: Any = train_it
    return {"sum": run(), "sizes": sizes}


def multi_process_metrics(folder: Path) -> Results:
    """The program itself leaves out what fills up the last round."""
    accelerator: Any = Accelerator(cpu=True)
    set_seed(6)
    _, valid = loaders()
    model, valid = accelerator.prepare(Classifier(), valid)
    model.eval()
    seen, sums = 0, 0.0
    for step, batch in enumerate(valid):
        with torch.no_grad():
            logits = model(**batch)["logits"]
        logits, labels = accelerator.gather((logits, batch["labels"]))
        if accelerator.use_distributed and step == len(valid) - 1:
            labels = labels[: len(valid.dataset) - seen]
            logits = logits[: len(valid.dataset) - seen]
        seen += len(labels)
        sums += logits[:, 0].sum().item()
    names = gather_object([f"of {accelerator.process_index}"])
    return {"seen": seen, "sum": sums, "names": names}


def early_stopping(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True)
    set_seed(8)
    train, _ = loaders(2)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    taken = 0
    for step, batch in enumerate(train):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        if step == 4 and accelerator.process_index == accelerator.num_processes - 1:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            break
    return {"taken": taken, "sum": total(model)}


def comm_hook(folder: Path) -> Results:
    handler = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    accelerator: Any = Accelerator(cpu=True, kwargs_handlers=[handler])
    set_seed(10)
    train, _ = loaders(8)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    for batch in train:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return {"sum": total(model)}


class AveragedSGD(torch.optim.SGD):
    """An optimizer with another set of weights for evaluation, as those without a schedule have."""

    is_training = True

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False


def schedule_free(folder: Path) -> Results:
    accelerator: Any = Accelerator(cpu=True)
    set_seed(12)
    train, valid = loaders(8)
    model = Classifier()
    optimizer = AveragedSGD(model.parameters(), lr=0.2)
    model, optimizer, train, valid = accelerator.prepare(model, optimizer, train, valid)
    model.train()
    optimizer.train()
    for batch in train:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    return {"accuracy": evaluate(accelerator, model, valid), "sum": total(model)}


def profiler(folder: Path) -> Results:
    handler = ProfileKwargs(activities=["cpu"], output_trace_dir=str(folder / "trace"))
    accelerator: Any = Accelerator(cpu=True, kwargs_handlers=[handler])
    model = accelerator.prepare(nn.Linear(4, 4))
    with accelerator.profile() as profile:
        model(torch.ones(2, 4))
    names = {event.key for event in profile.key_averages()}
    accelerator.wait_for_everyone()
    traces = sorted(os.listdir(folder / "trace"))
    return {"has linear": "aten::linear" in names, "traces": traces}


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 26

    def __iter__(self) -> Any:
        yield from torch.arange(26.0)


def streams(folder: Path) -> Results:
    found: Results = {}
    for dispatch in (None, False):
        for split in (False, True):
            config: Any = DataLoaderConfiguration(split_batches=split)
            config.dispatch_batches = dispatch
            accelerator: Any = Accelerator(cpu=True, dataloader_config=config)
            loader = accelerator.prepare(DataLoader(Stream(), batch_size=4))
            rows = [accelerator.gather_for_metrics(batch).tolist() for batch in loader]
            rest = [len(batch) for batch in skip(loader, 1)]
            found[f"{dispatch} {split}"] = [
                rows,
                accelerator.gather(torch.tensor(rest)).tolist(),
            ]
    return found


PROGRAMS = {
    program.__name__: program
    for program in (
        nlp_example,
        cv_example,
        complete_example,
        checkpointing,
        gradient_accumulation,
        autoregressive,
        cross_validation,
        local_sgd,
        memory,
        multi_process_metrics,
        early_stopping,
        comm_hook,
        schedule_free,
        profiler,
        streams,
    )
}


def main(folder: str, output: str, *names: str) -> None:
    found: Results = {}
    for name in names or PROGRAMS:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        try:
            found[name] = PROGRAMS[name](Path(folder))
        except Exception as error:
            if not os.environ.get("KEEP_GOING"):
                raise
            import traceback

            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
    Accelerator(cpu=True).end_training()
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
