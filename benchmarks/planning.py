"""How near a plan comes to the memory that a training takes, for two models under each strategy.

The plan is made in a process of its own, which allocates nothing of the model. Then the same module is trained in fresh
processes, one or two, on the CPU with gloo. Their peak is the highest resident size during the third step, as Linux
notes it (VmHWM), over that before the module was made. A tiny module is trained there first, so that what libraries
load and set up for their first step is not counted: a plan speaks of the model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .contenders import settle
from .ddp import connect, launch
from .report import Table, verdict
from .sharded import (
    BUCKETS,
    GIVE_BACK,
    MEASURED,
    STRATEGIES,
    forget_peak,
    resident,
    strategies,
)

LIMIT = 0.1  # of the measured peak
LENGTH, VOCABULARY = 64, 8000  # tokens of a sequence, and different ones
BATCH = 8  # sequences

# -- the models -----------------------------------------------------------------------------------------------


class Stack:
    """Linear layers: nearly all of its memory are parameters, gradients and AdamW's states."""

    def __init__(self, width: int, layers: int, look: Any) -> None:
        super().__init__()
        self.look = look
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look(batch_idx)
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Transformer:
    """A small one, with more activations than parameters."""

    def __init__(self, width: int, layers: int, look: Any) -> None:
        super().__init__()
        self.look = look
        self.tokens = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look(batch_idx)
        tokens, labels = batch  # (batch, time), (batch,)
        hidden = self.encoder(self.tokens(tokens))  # (batch, time, width)
        return nn.functional.cross_entropy(self.head(hidden[:, 0]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def stack_data(samples: int, width: int) -> TensorDataset:
    return TensorDataset(torch.randn(samples, width))


def text_data(samples: int, width: int) -> TensorDataset:
    tokens = torch.randint(VOCABULARY, (samples, LENGTH))
    return TensorDataset(tokens, torch.randint(2, (samples,)))


PROCESSES = 2
# By name: the class, its data, width, layers, and samples of a batch.
MODELS: dict[str, tuple[type, Any, int, int, int]] = {
    "stack": (Stack, stack_data, 1440, 16, 1),
    "transformer": (Transformer, text_data, 512, 6, BATCH),
}
TINY = (64, 1)  # width and layers


def make_module(kind: type, width: int, layers: int, look: Any) -> Any:
    from loopwright.framework import Module

    return type(kind.__name__, (kind, Module), {})(width, layers, look)


def make_trainer(strategy: str, buckets: bool, precision: str) -> Any:
    from loopwright.framework import Trainer
    from loopwright.strategies import DeepSpeedStrategy

    chosen: Any = strategy
    if buckets and "deepspeed" in strategy:
        config = {"zero_optimization": BUCKETS}
        chosen = DeepSpeedStrategy(int(strategy[-1]), config=config)
    return Trainer(
        accelerator="cpu",
        devices=1 if strategy == "single" else PROCESSES,
        strategy=chosen,
        precision=precision,
        max_epochs=1,
        barebones=True,
    )


# -- in fresh processes ---------------------------------------------------------------------------------------


def measure(strategy: str, model: str, buckets: bool, precision: str) -> dict[str, int]:
    """The peak of a training, in bytes over those before."""
    settle()
    kind, data, width, layers, batch = MODELS[model]
    processes = 1 if strategy == "single" else PROCESSES
    if processes > 1:
        connect()

    def train(width: int, layers: int, look: Any) -> None:
        trainer = make_trainer(strategy, buckets, precision)
        samples = data(processes * batch * (MEASURED + 2), width)
        trainer.fit(make_module(kind, width, layers, look), DataLoader(samples, batch))

    train(*TINY, lambda batch_idx: None)
    found, before = {}, forget_peak()

    def look(batch_idx: int) -> None:
        if batch_idx == MEASURED:
            forget_peak()
        elif batch_idx == MEASURED + 1:
            found["peak"] = resident("VmHWM") - before

    train(width, layers, look)
    return found


def plan(model: str, buckets: bool, precision: str) -> dict[str, dict[str, Any]]:
    """What plans say for each strategy; and what making them took of this process's memory."""
    settle()
    kind, data, width, layers, batch = MODELS[model]
    found = {}
    for strategy in strategies(STRATEGIES):
        trainer = make_trainer(strategy, buckets, precision)
        with torch.device("meta"):
            module = make_module(kind, width, layers, lambda batch_idx: None)
        estimate = trainer.plan(
            module,
            DataLoader(data(batch, width), batch),
            strategies=[strategy],
            precisions=[precision],
            activation_checkpointing=False,
        ).estimates[0]
        found[strategy] = {"planned": estimate.peak, "moment": estimate.moment}
    return found


# -- in the parent --------------------------------------------------------------------------------------------


def start(strategy: str, model: str, buckets: bool, precision: str) -> list[Any]:
    """What one or two processes measured; of "plan", what one process planned."""
    processes = 1 if strategy in ("single", "plan") else PROCESSES
    # A plan is for as many processes as the Trainer asks for, and starts none.
    alone = ["LOOPWRIGHT_LAUNCH=off"] if strategy == "plan" else []
    with tempfile.TemporaryDirectory() as folder:
        launch(
            __name__,
            "0",
            folder,
            strategy,
            model,
            str(int(buckets)),
            precision,
            processes=processes,
            environment=[GIVE_BACK, *alone],
        )
        return [
            json.loads(Path(folder, f"{rank}.json").read_text())
            for rank in range(processes)
        ]


def compare(precision: str = "32-true", only: str = "") -> Table:
    """A row for each model and strategy; of two processes, the one that takes more counts."""
    rows, figures = [], {}
    for model in MODELS:
        for buckets in (True, False):
            if only and only not in model:
                continue
            (planned,) = start("plan", model, buckets, precision)
            for strategy in planned:
                # ZeRO's with buckets of its own size, and with those of its defaults.
                if not buckets and "deepspeed" not in strategy:
                    continue
                measured = max(
                    each["peak"] for each in start(strategy, model, buckets, precision)
                )
                estimate = planned[strategy]
                off = estimate["planned"] / measured - 1
                name = f"{model}, `{strategy}`" + (
                    ""
                    if buckets or "deepspeed" not in strategy
                    else ", default buckets"
                )
                figures[name] = {**estimate, "measured": measured}
                rows.append(
                    [
                        name,
                        f"{estimate['planned'] / 1e6:.0f}",
                        f"{measured / 1e6:.0f}",
                        f"{100 * off:+.1f} %",
                        *verdict(abs(off), LIMIT),
                    ]
                )
    header = ("", "planned, MB", "measured, MB", "off by", "target", "")
    notes = ["ZeRO's buckets hold 4 million numbers, or by default 500 million."]
    return Table(
        "Peaks of memory, as planned and as measured", header, rows, figures, notes
    )


if __name__ == "__main__":
    _, folder, strategy, model, buckets, precision = sys.argv[1:]
    if "deepspeed" in strategy:
        import_module("deepspeed")  # later, it would hold the process group
    arguments = (model, bool(int(buckets)), precision)
    outcome = plan(*arguments) if strategy == "plan" else measure(strategy, *arguments)
    Path(folder, f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(outcome))
    os._exit(0)  # DeepSpeed may hold the process group even so
