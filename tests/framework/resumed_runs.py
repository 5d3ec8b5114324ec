"""Runs with something of everything, from their begin and from a checkpoint of their middle.

``python -m tests.framework.resumed_runs make FOLDER`` trains each scene without a break, and keeps in FOLDER the
checkpoint of its middle, and what the rest of the run gave. With ``resume`` it goes on from these checkpoints, and says
where the rest is not the same to the last bit.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric

from loopwright.callbacks import Callback, EarlyStopping
from loopwright.framework import CombinedLoader, Engine, Module, seed_everything
from tests.strategies.distributed import call_all, in_new_processes, quiet

SAMPLES = 30
EPOCHS = 3
# Two batches into the second epoch, where no window is open: by the number of processes, batches of each.
SAVED_AT = {1: 12, 2: 7}


class Samples(Dataset):
    """Each sample says which one it is, and is augmented."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.arange(8.0) * index / 50 + torch.rand(8) + random.random(), index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        for index in torch.randperm(SAMPLES).tolist():
            yield samples[index]


class Net(Module):
    """Dropout, batch norm, schedulers of steps and of a monitored value, logged values and a metric."""

    def __init__(self, width: int = 16, note: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(8, width),
            nn.Dropout(0.3),
            nn.BatchNorm1d(width),
            nn.Linear(width, 1),
        )
        self.mean_loss = MeanMetric()
        self.losses: list[float] = []
        self.samples: list[Any] = []
        self.values: list[float] = []

    def note_batch(self, batch: Any, loss: Tensor) -> None:
        self.samples.append(sample_numbers(batch))
        self.losses.append(loss.item())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.note_batch(batch, loss)
        self.mean_loss.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=1)
        self.log("metric", self.mean_loss, on_step=False, on_epoch=True)
        return {"loss": loss, "weight": 1.0 + batch_idx % 2}

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return sum(self.loss(one) for one in batch.values() if one is not None)  # type: ignore[return-value]
        return (self.body(batch[0]) - batch[0].mean()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.body(batch[0]).square().mean())

    def on_train_epoch_end(self) -> None:
        self.values.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [
            {"scheduler": warm, "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss"},
        ]


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 10)


class OneScheduler(Net):
    """For strategies that shard: no batch norm, whose statistics differ between the processes."""

    def __init__(self, width: int = 16, note: Any = None) -> None:
        super().__init__(width, note)
        self.body[2] = nn.LayerNorm(width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up), "interval": "step"}}  # fmt: skip


class TwoOptimizers(Net):
    """Manual optimization of two parts, one of them every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.note_batch(batch, loss)
        self.log("train_loss", loss, batch_size=1)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.SGD(self.body[0].parameters(), 0.05, 0.9),
            torch.optim.Adam(self.body[3].parameters()),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 2, 0.8)]


class Save(Callback):
    """Saves after so many batches of a run, and has a state that counts them."""

    def __init__(self, path: Path | None, after: int) -> None:
        self.path = path
        self.after = after
        self.batches = 0
        self.batches_of_this_run = 0
        self.steps_before = 0  # calls of training_step until then

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        self.batches_of_this_run += 1
        if self.path is not None and self.batches_of_this_run == self.after:
            trainer.save_checkpoint(self.path)
            self.steps_before = len(module.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "pair": (1, torch.ones(2))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Note:
    """An object that only a pickle can hold."""


def sample_numbers(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {
            name: sample_numbers(one) for name, one in batch.items() if one is not None
        }
    return batch[1].tolist()


def inputs_of(batch: Any) -> Tensor:
    parts = (
        [part for part in batch.values() if part is not None]
        if isinstance(batch, dict)
        else [batch]
    )
    return torch.cat([x for x, _ in parts])


def shuffled(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(Samples(), 3, shuffle=True, **arguments)


def as_list() -> list[Any]:
    samples = torch.linspace(0, 2, SAMPLES * 8).reshape(SAMPLES, 8)
    return [
        (part, index)
        for part, index in zip(
            samples.split(3), torch.arange(SAMPLES).split(3), strict=True
        )
    ]


class OwnSampler(RandomSampler):
    """A sampler of the user's own, whose order is not planned."""


class OwnIteration(DataLoader):
    """A loader that iterates in a way of its own."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class Batches:
    """An iterable that knows nothing about itself."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        for first in torch.randperm(SAMPLES // 3).tolist():
            parts = [samples[3 * first + index] for index in range(3)]
            yield (
                torch.stack([x for x, _ in parts]),
                torch.tensor([number for _, number in parts]),
            )


class Divided(IterableDataset):
    """A stream of which each process has its part, and keeps its place."""

    def __init__(self) -> None:
        self.given = self.begin = 0

    def __iter__(self) -> Iterator[Any]:
        rank, processes = (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        samples, self.given, self.begin = Samples(), self.begin, 0
        while self.given < SAMPLES:
            self.given += 1
            yield samples[(self.given * processes + rank) % SAMPLES]
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["given"]


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(), 3)


def stateful(**arguments: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Samples(), 3, shuffle=True, **arguments)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "own sampler": lambda: DataLoader(Samples(), 3, sampler=OwnSampler(Samples())),
    "own iteration": lambda: OwnIteration(Samples(), 3, shuffle=True),
    "own batch sampler": lambda: DataLoader(
        Samples(),
        batch_sampler=BatchSampler(OwnSampler(Samples()), 3, False),
    ),
    "batches": Batches,
    "stream with a worker": lambda: DataLoader(Stream(), 3, num_workers=1),
    "stateful": stateful,
    "stateful stream": lambda: StatefulDataLoader(Stream(), 3),
    "divided": lambda: StatefulDataLoader(Divided(), 3),
}
TOGETHER = {
    "shuffled": shuffled,
    "stream": stream,
    "stateful": stateful,
    "list": lambda: as_list(),
}
PAIRS = (("shuffled", "stream"), ("shuffled", "stateful"), ("stream", "stateful"), ("stateful", "stateful"),
         ("shuffled", "list"))  # fmt: skip
for mode in CombinedLoader.MODES:
    for pair in PAIRS:
        LOADERS[f"{mode}: {' and '.join(pair)}"] = lambda mode=mode, pair=pair: (
            CombinedLoader(dict(enumerate(TOGETHER[name]() for name in pair)), mode)
        )


# By name: the module, the loader, the Trainer's arguments.
RUNS: dict[str, tuple[Callable[[], Module], Callable[[], Any], dict[str, Any]]] = {
    "windows": (
        Net,
        shuffled,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    ),
    "mixed": (Net, shuffled, {"precision": "16-mixed", "val_check_interval": 0.5}),
    "manual": (TwoOptimizers, shuffled, {}),
    "workers": (Net, lambda: shuffled(num_workers=1, persistent_workers=True), {}),
    "list": (Net, as_list, {"limit_train_batches": 7}),
    "stream": (Net, stream, {}),
    "stateful": (Net, stateful, {}),
    "combined": (
        Net,
        lambda: {"a": shuffled(), "b": DataLoader(Stream(), 4)},
        {"accumulate_grad_batches": 2},
    ),
    "micro batches": (OneScheduler, shuffled, {"micro_batch": 2}),
    "sharded": (OneScheduler, shuffled, {"accumulate_grad_batches": 2}),
    "objects": (lambda: Net(note=Note()), shuffled, {}),
}
SHARDED = (
    "ddp", "fsdp", "fsdp_cpu_offload", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3",
    "deepspeed_stage_2_offload", "deepspeed_stage_3_offload",
)  # fmt: skip


def train(
    name: str,
    path: Path,
    resume: bool,
    strategy: str = "auto",
    save_again: bool = False,
) -> dict[str, Any]:
    """One run of the Trainer: from its begin, saved in its middle, or from there.

    Returns:
        What each rank saw and found: all of it, or what came after the checkpoint.
    """
    kind, loader, arguments = RUNS[name] if name in RUNS else (Net, LOADERS[name], {})
    seed_everything(5 if resume else 3, workers=True, verbose=False)
    module: Any = kind()
    save = Save(path, SAVED_AT[int(os.environ.get("WORLD_SIZE", "1"))])
    if resume:
        save = Save(path.with_name(f"{path.name} again") if save_again else None, 2)
    stops: dict[str, Any] = (
        {"patience": 1, "min_delta": 10.0} if name == "windows" else {"patience": 99}
    )
    stopping = EarlyStopping("val_loss", **stops)
    trainer = quiet(
        strategy=strategy, max_epochs=EPOCHS, callbacks=[save, stopping], **arguments
    )
    validation = as_list()[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, loader(), validation, ckpt_path=str(path) if resume else None
        )
    begin = 0 if resume else save.steps_before
    seen = {"samples": module.samples[begin:], "losses": module.losses[begin:]}
    whole = trainer.strategy.gather_objects(seen)
    found = {
        "samples": [each["samples"] for each in whole],
        "losses": [each["losses"] for each in whole],
        "value": float(trainer.callback_metrics["val_loss"]),
        "counters": [
            trainer.global_step,
            trainer.current_epoch,
            save.batches,
            stopping.wait_count,
        ],
    }
    if trainer.strategy.world_size == 1 and strategy == "auto":
        found["weights"] = weights_of(module)
    return found


def weights_of(module: nn.Module) -> dict[str, list[float]]:
    return {
        name: parameter.flatten().tolist()
        for name, parameter in module.state_dict().items()
    }


def own_loop(
    strategy: str,
    path: Path,
    resume: bool,
    precision: Any = "32-true",
    make_loader: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Two epochs with an Engine: from the begin, saved in the second, or from there."""
    seed_everything(5 if resume else 3, workers=True, verbose=False)
    engine = Engine(
        accelerator="cpu",
        strategy=strategy,
        precision=precision,
        launch=False,
        gradient_accumulation_steps=2,
    )
    engine.connect()
    module = nn.Sequential(
        nn.Linear(8, 16), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 1)
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    prepared: Any = engine.prepare(
        module, optimizer, (make_loader or shuffled)(), scheduler
    )
    model, optimizer, loader, scheduler = prepared
    if resume:
        engine.load_state(path)
    samples, losses = [], []
    while loader.epoch < 2:
        for batch in loader:
            x = inputs_of(batch)
            with engine.accumulate(model):
                loss = (model(x) - x.mean()).square().mean()
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            samples.append(sample_numbers(batch) if loader.share else [])
            losses.append(loss.item())
            if not resume and loader.epoch == 1 and loader.batches == 4:
                engine.save_state(path)
                samples, losses = [], []
    told = engine.strategy.gather_objects((samples, losses))
    engine.end_training()
    return {
        "samples": [samples for samples, _ in told],
        "losses": [losses for _, losses in told],
        "counters": [engine.global_step],
    }


def calls(folder: Path, processes: int, resume: bool) -> dict[str, tuple[Any, ...]]:
    """All scenes at so many processes, for :func:`call_all`."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in RUNS:
        found[name] = (train, name, folder / str(processes) / name, resume)
    for strategy in SHARDED:
        path = folder / str(processes)
        found[strategy] = (train, "sharded", path / strategy, resume, strategy)
        found[f"engine {strategy}"] = (
            own_loop,
            strategy,
            path / f"engine {strategy}",
            resume,
        )
    found["engine"] = (
        own_loop,
        "auto",
        folder / str(processes) / "engine",
        resume,
        "16-mixed",
    )
    if processes == 2:
        found.pop("mixed")  # it shows nothing that one process does not
    return found


def resume_all(folder: Path, processes: int) -> Iterator[tuple[str, Any, Any]]:
    """Each scene's name, what was expected and what came."""
    expected = json.loads((folder / str(processes) / "expected.json").read_text())
    found = in_new_processes(processes, call_all, calls(folder, processes, resume=True))
    found = json.loads(json.dumps(found))
    for name in expected:
        yield name, expected[name], found[name]


def main(action: str, folder: Path) -> None:
    for processes in (1, 2):
        if action == "make":
            (folder / str(processes)).mkdir(parents=True)
            made = in_new_processes(
                processes, call_all, calls(folder, processes, resume=False)
            )
            (folder / str(processes) / "expected.json").write_text(json.dumps(made))
            continue
        for name, expected, found in resume_all(folder, processes):
            differing = [key for key in expected if expected[key] != found[key]]
            print(
                f"{processes} processes, {name}: {differing or 'the same to the last bit'}"
            )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute())
