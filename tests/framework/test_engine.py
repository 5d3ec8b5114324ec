"""The Engine in loops of one's own: as the Trainer, in one process and in two, and what it saves and leaves."""

from __future__ import annotations

import ast
import copy
import logging
import os
import pickle
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.callbacks import Callback
from loopwright.framework import (
    CheckpointError,
    CombinedLoader,
    Engine,
    Module,
    find_executable_batch_size,
    get_logger,
    launch,
)
from loopwright.framework.data.iteration import INFINITE, loader_length
from loopwright.loggers import CSVLogger, Logger, TensorBoardLogger
from loopwright.strategies import Capabilities, SingleDeviceStrategy
from tests.strategies.distributed import all_in_processes, in_processes, quiet, told_by

ROOT = Path(__file__).resolve().parents[2]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))


def regression(samples: int = 76) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True))


def optimizer_of(model: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)


def make(**arguments: Any) -> Engine:
    return Engine(accelerator="cpu", **arguments)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two processes tells, which are started once for all that needs no end of them."""
    folder = tmp_path_factory.mktemp("two")
    return all_in_processes(
        2,
        {
            "compared": (compare_with_trainer,),
            "players": (two_players,),
            "windows": (windows_of_streams,),
            "prompts": (prompts,),
            "resumed": (resumed, str(folder / "state"), STOPS[2]),
            "uneven": (uneven,),
            "searches": (search_at_all_places,),
            "logged": (log_in_order, str(folder / "log")),
        },
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of three: sums of two do not depend on their order."""
    folder = tmp_path_factory.mktemp("three")
    return all_in_processes(
        3,
        {"prompts": (prompts,), "resumed": (resumed, str(folder / "state"), STOPS[3])},
    )


# -- as the Trainer ---------------------------------------------------------------------------------------------------


class Regression(Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.network(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = optimizer_of(self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train_with_trainer(precision: str) -> Any:
    model = Regression()
    torch.manual_seed(3)
    trainer = quiet(
        precision=precision,
        max_epochs=2,
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
    )
    trainer.fit(model, DataLoader(regression(), batch_size=4, shuffle=True))
    return (
        model.losses,
        [weight.detach().clone() for weight in model.parameters()],
        trainer.global_step,
    )


def train_with_engine(precision: str) -> Any:
    model = network()
    optimizer, scheduler = optimizer_of(model)
    torch.manual_seed(3)
    engine = make(precision=precision, gradient_accumulation_steps=3)
    model, optimizer, scheduler, loader = engine.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(regression(), batch_size=4, shuffle=True),
    )
    losses = []
    for _ in range(2):
        for x, y in loader:
            with engine.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return (
        losses,
        [weight.detach().clone() for weight in model.parameters()],
        engine.global_step,
    )


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def compare_with_trainer() -> Any:
    return {
        precision: (train_with_trainer(precision), train_with_engine(precision))
        for precision in PRECISIONS
    }


@pytest.fixture(scope="module", params=[1, 2])
def compared(request: pytest.FixtureRequest) -> Any:
    return (
        request.param,
        compare_with_trainer()
        if request.param == 1
        else request.getfixturevalue("two")["compared"],
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_and_weights_are_the_trainers_to_the_bit(compared: Any, precision: str):
    processes, found = compared
    (losses, weights, steps), (own_losses, own_weights, own_steps) = found[precision]
    assert len(own_losses) == (38 if processes == 1 else 20)
    assert own_losses == losses
    assert own_steps == steps == (14 if processes == 1 else 8)
    assert all(
        torch.equal(own, other) for own, other in zip(own_weights, weights, strict=True)
    )


def test_the_loops_use_the_public_methods_of_the_engine():
    for name in ("fit.py", "evaluate.py", "step.py"):
        tree = ast.parse(Path(ROOT, "framework/loop", name).read_text(encoding="utf-8"))
        attributes = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        ]
        assert not [
            ast.unparse(node) for node in attributes if node.attr == "strategy"
        ], name
        own = [
            node for node in attributes if ast.unparse(node.value).endswith("engine")
        ]
        assert own
        assert not [ast.unparse(node) for node in own if node.attr.startswith("_")], (
            name
        )


# -- what prepare returns ---------------------------------------------------------------------------------------------


class Named(nn.Module):
    """A model with an attribute, a keyword and a dict of outputs, as Hugging Face's have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.config = {"hidden": 4}

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.layer(x) * scale}

    def generate(self, x: Tensor) -> Tensor:
        return self(x)["logits"].argmax(1)


def test_a_prepared_model_is_the_model_in_all_but_its_call():
    model = Named()
    engine = make(precision="bf16-mixed")
    prepared = engine.prepare(model)
    assert isinstance(prepared, Named)
    assert prepared.config is model.config
    assert list(prepared.state_dict()) == ["layer.weight", "layer.bias"]
    assert engine.unwrap_model(prepared) is model
    output = prepared(torch.ones(3, 4), scale=2.0)["logits"]
    assert output.dtype == torch.float32  # computed in bfloat16
    assert not torch.equal(output, model(torch.ones(3, 4), scale=2.0)["logits"])
    assert prepared.generate(torch.ones(3, 4)).shape == (3,)
    prepared.eval()
    assert not model.training
    assert engine.prepare(prepared) is prepared
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert type(copied) is Named
        assert torch.equal(copied.layer.weight, model.layer.weight)
        assert copied.layer.weight is not model.layer.weight


def test_where_nothing_is_to_be_added_the_model_is_returned():
    model = Named()
    assert make(strategy="single", devices=1).prepare(model) is model


def test_anything_else_comes_back_as_it_is():
    engine, thing = make(), {"a": 1}
    model, same = engine.prepare(nn.Linear(1, 1), thing)
    assert same is thing
    assert isinstance(model, nn.Linear)


def two_players() -> Any:
    """A generator and a discriminator, each with its optimizer, prepared one by one and in any order."""
    torch.manual_seed(0)
    generator, critic = (
        nn.Linear(2, 4),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)),
    )
    g_opt, c_opt = (
        torch.optim.SGD(model.parameters(), lr=0.1) for model in (generator, critic)
    )
    engine = make(gradient_accumulation_steps=2, precision="16-mixed")
    real = regression(40)
    c_opt, loader, critic = engine.prepare(
        c_opt, DataLoader(real, batch_size=8 // engine.num_processes), critic
    )
    generator = engine.prepare(generator)
    g_opt = engine.prepare(g_opt)
    for batch_idx, (x, _) in enumerate(loader):
        noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(batch_idx))
        noise = noise.tensor_split(engine.num_processes)[engine.process_index]
        with engine.accumulate(critic, generator):
            loss = (
                critic(generator(noise).detach()).mean()
                - critic(x[: len(noise)]).mean()
            )
            engine.backward(loss)
            c_opt.step()
            c_opt.zero_grad()
            engine.backward(-critic(generator(noise)).mean())
            engine.clip_grad_value_(generator.parameters(), 0.5)
            g_opt.step()
            g_opt.zero_grad()
            c_opt.zero_grad()
    assert engine.global_step == 3
    return [
        parameter.detach().clone()
        for model in (generator, critic)
        for parameter in model.parameters()
    ]


def test_two_models_with_their_optimizers_train_alike_in_one_process_and_in_two(
    two: dict[str, Any],
):
    torch.testing.assert_close(two["players"], two_players(), rtol=2e-3, atol=1e-4)


def test_a_frozen_model_and_one_that_is_unfrozen_later():
    engine = make()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).requires_grad_(False)
    model = engine.prepare(model)
    assert model(torch.ones(2, 4)).shape == (2, 1)


# -- loaders ----------------------------------------------------------------------------------------------------------


class Numbers(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.arange(self.count))


class Told(Numbers):
    """A stream whose length tells another number of samples."""

    def __init__(self, count: int, told: int) -> None:
        super().__init__(count)
        self.told = told

    def __len__(self) -> int:
        return self.told


def windows_of_streams() -> Any:
    engine = make(gradient_accumulation_steps=3)
    processes = engine.num_processes
    model = engine.prepare(nn.Linear(1, 1))
    loaders: list[Any] = [
        DataLoader(Numbers(7 * processes), batch_size=1),
        DataLoader(Told(7 * processes, told=4 * processes), batch_size=1),
        DataLoader(Told(7 * processes, told=9 * processes), batch_size=1),
        StatefulDataLoader(Told(7 * processes, told=9 * processes), batch_size=1),
        CombinedLoader(
            [
                DataLoader(Told(7 * processes, told=5 * processes), batch_size=1),
                range(99),
            ]
        ),
    ]
    found = []
    for loader in engine.prepare(*loaders):
        flags, ends = [], []
        for batch in loader:
            batch = batch[0] if isinstance(batch, list) else batch
            with engine.accumulate(model):
                engine.backward(model(batch[:, None].float()).mean())
                flags.append(engine.sync_gradients)
                ends.append(loader.end_of_dataloader)
        found.append((flags, ends, loader_length(loader)))
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_the_end_of_a_stream_ends_its_window(two: dict[str, Any], processes: int):
    found = windows_of_streams() if processes == 1 else two["windows"]
    assert [told for *_, told in found] == [INFINITE, 4, 9, 9, 5]
    for flags, ends, _ in found:
        assert flags == [False, False, True, False, False, True, True]
        assert ends == [False] * 6 + [True]


def test_accumulation_that_changes():
    engine = make(gradient_accumulation_steps=3)
    model = engine.prepare(nn.Linear(4, 1))
    loader, seen = engine.prepare(DataLoader(regression(44), batch_size=4)), []
    for batch_idx, (x, _) in enumerate(loader):
        if batch_idx in (1, 6, 8):  # inside a window, and at its end
            engine.gradient_accumulation_steps = {1: 2, 6: 1, 8: 2}[batch_idx]
        with engine.accumulate(model):
            engine.backward(model(x).mean())
            seen.append(engine.sync_gradients)
    assert seen == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps must be an integer from 1; got 0"
    ):
        engine.gradient_accumulation_steps = 0


def test_an_evaluation_loop_inside_a_training_loop():
    engine = make(gradient_accumulation_steps=2)
    model = engine.prepare(nn.Linear(4, 1))
    train, val = engine.prepare(
        *(DataLoader(regression(20), batch_size=4) for _ in range(2))
    )
    seen = []
    for batch_idx, (x, _) in enumerate(train):
        with engine.accumulate(model):
            engine.backward(model(x).mean())
            seen.append(engine.sync_gradients)
        if batch_idx == 2:
            assert sum(len(x) for x, _ in val) == 20
    assert seen == [False, True, False, True, True]


def test_skipping_batches_and_setting_the_epoch():
    engine = make()
    data = TensorDataset(torch.arange(12))
    loader: Any = engine.prepare(DataLoader(data, batch_size=2, shuffle=True))
    epochs = [[batch[0].tolist() for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    loader.set_epoch(1)
    skipped = engine.skip_first_batches(loader, 2)
    assert len(skipped) == 4
    assert [batch[0].tolist() for batch in skipped] == epochs[1][2:]
    plain = engine.skip_first_batches(DataLoader(data, batch_size=2), 5)
    assert [batch[0].tolist() for batch in plain] == [[10, 11]]


@pytest.mark.parametrize("left_by", ["its end", "break", "set_epoch"])
def test_an_epoch_after_one_that_was_taken_up_is_whole(tmp_path: Path, left_by: str):
    data = TensorDataset(torch.arange(12))
    engine = make()
    loader: Any = engine.prepare(DataLoader(data, batch_size=2))
    for _ in loader:
        if loader.batches == 2:
            engine.save_state(tmp_path / "state")
    engine = make()
    loader = engine.prepare(DataLoader(data, batch_size=3))
    engine.load_state(tmp_path / "state")
    assert len(loader) == 2 + 3
    last = 11 if left_by == "its end" else 6
    rest = []
    for batch in loader:
        rest += batch[0].tolist()
        if rest[-1] == last and left_by != "its end":
            break
    assert rest == list(range(4, last + 1))
    if left_by == "set_epoch":
        loader.set_epoch(0)
    told = [
        (batch[0].tolist(), len(loader), loader.end_of_dataloader) for batch in loader
    ]
    assert told == [(list(range(i, i + 3)), 4, i == 9) for i in (0, 3, 6, 9)]


def prompts() -> Any:
    engine = make()
    with engine.split_between_processes([f"prompt {i}" for i in range(101)]) as mine:
        results = [text.upper() for text in mine]
    everything = engine.gather_for_metrics(results, use_gather_object=True)
    loader, model = engine.prepare(
        DataLoader(TensorDataset(torch.arange(101.0)[:, None]), batch_size=8),
        nn.Linear(1, 1),
    )
    model.eval()
    with torch.no_grad():
        pairs = [engine.gather_for_metrics((x, model(x))) for (x,) in loader]
    inputs = torch.cat([x for x, _ in pairs])
    outputs = torch.cat([y for _, y in pairs])
    return (
        len(results),
        everything,
        inputs.flatten().tolist(),
        bool(torch.equal(outputs, engine.unwrap_model(model)(inputs))),
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_101_prompts_give_101_results_in_order(
    two: dict[str, Any], three: dict[str, Any], processes: int
):
    own, everything, inputs, _ = (
        prompts() if processes == 1 else {2: two, 3: three}[processes]["prompts"]
    )
    assert own == -(-101 // processes)
    assert everything == [f"PROMPT {i}" for i in range(101)]
    assert inputs == [float(i) for i in range(101)]


# -- state ------------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def interrupted(folder: str, stop: int | None, resume: bool, workers: int = 0) -> Any:
    """Two epochs with dropout and augmentation; saved after batch ``stop``, or gone on with from there."""
    model = network()
    optimizer, scheduler = optimizer_of(model)
    torch.manual_seed(7 if resume else 3)  # the numbers come from the checkpoint
    random.seed(0 if resume else 1)
    engine, counter = (
        make(gradient_accumulation_steps=3, precision="16-mixed"),
        Counter(),
    )
    engine.register_for_checkpointing(counter)
    prepared: Any = engine.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(regression(), batch_size=4, shuffle=True, num_workers=workers),
    )
    model, optimizer, scheduler, loader = prepared
    if resume:
        engine.load_state(folder)
    losses = []
    for _ in range(loader.epoch, 2):
        for x, y in loader:
            with engine.accumulate(model):
                loss = (
                    nn.functional.mse_loss(model(x + torch.randn_like(x)), y)
                    * random.random()
                )
                engine.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            counter.count += 1
            losses.append(loss.item())
            if counter.count == stop:
                engine.save_state(folder)
                return losses
    return (
        losses,
        [weight.detach().clone() for weight in model.parameters()],
        engine.global_step,
    )


def resumed(folder: str, stops: tuple[int, ...]) -> Any:
    whole, after = interrupted(folder, None, resume=False), {}
    for stop in stops:
        interrupted(folder, stop, resume=False)
        after[stop] = interrupted(folder, None, resume=True)
    return whole, after


STOPS = {1: (3, 6, 19, 22), 2: (6, 13), 3: (6, 10)}  # by number of processes


@pytest.mark.parametrize("processes", STOPS)
def test_a_loop_goes_on_where_it_was_saved_to_the_bit(
    two: dict[str, Any], three: dict[str, Any], tmp_path: Path, processes: int
):
    if processes == 1:
        whole, found = resumed(str(tmp_path / "state"), STOPS[1])
    else:
        whole, found = {2: two, 3: three}[processes]["resumed"]
    assert tuple(found) == STOPS[processes]
    for stop, after in found.items():
        assert after[0] == whole[0][stop:], stop
        assert after[2] == whole[2]
        assert all(torch.equal(a, b) for a, b in zip(after[1], whole[1], strict=True))


def test_a_window_that_was_open_is_begun_again(tmp_path: Path):
    folder = str(tmp_path / "state")
    interrupted(folder, 5, resume=False)
    engine = make()
    loader: Any = engine.prepare(DataLoader(regression(), batch_size=4, shuffle=True))
    with pytest.raises(CheckpointError, match="1 models, and this engine has 0"):
        engine.load_state(folder)
    assert loader.batches == 0
    after = interrupted(folder, None, resume=True)
    assert len(after[0]) == 38 - 3


def test_a_checkpoint_of_the_trainer_is_taken_up_in_a_loop(tmp_path: Path):
    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    whole = Regression()
    torch.manual_seed(3)
    quiet(callbacks=[Save()]).fit(
        whole, DataLoader(regression(), batch_size=4, shuffle=True)
    )

    model = Regression()
    optimizer, scheduler = optimizer_of(model)
    engine = make()
    optimizer, scheduler, loader, _ = engine.prepare(
        optimizer,
        scheduler,
        DataLoader(regression(), batch_size=4, shuffle=True),
        model,
    )
    engine.load_state(tmp_path / "five.ckpt")
    for batch_idx, batch in enumerate(loader):
        loss = model.training_step(batch, batch_idx)
        engine.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert model.losses == whole.losses[5:]


def test_what_a_loop_saved_is_loaded_as_a_module(tmp_path: Path):
    model = Regression()
    engine = make()
    prepared = engine.prepare(model)
    engine.save_state(tmp_path / "state")
    loaded = Regression.load_from_checkpoint(tmp_path / "state")
    weight = next(model.network.parameters())
    assert torch.equal(next(loaded.network.parameters()), weight)
    path = engine.save_model(prepared, tmp_path / "weights")
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["network.0.weight"], weight)


def test_the_state_of_an_optimizer_of_no_prepared_model_is_saved(tmp_path: Path):
    """As that of a model which a program moves and runs itself."""

    def prepared() -> tuple[Engine, nn.Module, Any]:
        engine = make()
        other = nn.Linear(1, 1)
        adam = torch.optim.Adam(other.parameters(), lr=0.1)
        _, optimizer = engine.prepare(nn.Linear(1, 1), adam)
        return engine, other, optimizer

    engine, other, optimizer = prepared()
    other(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    engine.save_state(tmp_path / "state")
    resumed, _, optimizer_2 = prepared()
    resumed.load_state(tmp_path / "state")
    saved, loaded = optimizer.state_dict(), optimizer_2.state_dict()
    assert saved["state"][0]["step"] == 1
    assert loaded == saved


def test_other_weights_and_objects_without_state_are_refused(tmp_path: Path):
    engine = make()
    with pytest.raises(ValueError, match="state_dict and load_state_dict"):
        engine.register_for_checkpointing(object())
    engine.prepare(nn.Linear(2, 1))
    engine.save_state(tmp_path / "state")
    other = make()
    other.prepare(nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match="another architecture than Linear"):
        other.load_state(tmp_path / "state")


# -- peers ------------------------------------------------------------------------------------------------------------


def gradient_after_a_step_that_was_left_out(engine: Engine) -> float:
    """Of a weighted loss whose gradient is 1, after the batch before was given up."""
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = engine.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0)
    )
    before = model.weight.item()
    for step in (False, True):
        with engine.accumulate(model):
            engine.backward(model(torch.ones(1, 1)).sum(), weight=3.0)
            if step:
                optimizer.step()
            optimizer.zero_grad()
    return before - model.weight.item()


def uneven() -> Any:
    engine = make()
    rank = engine.process_index
    gathered = engine.gather_for_metrics(
        {"a": torch.arange(rank + 1), "b": torch.tensor(float(rank))}
    )
    padded = engine.pad_across_processes(torch.ones(rank + 1, 2), pad_index=-1)
    engine.set_trigger() if rank == 1 else None
    return {
        "gathered": (gathered["a"].tolist(), gathered["b"].tolist()),
        "padded": engine.gather(padded).tolist(),
        "triggers": (engine.check_trigger(), engine.check_trigger()),
        "left_out": gradient_after_a_step_that_was_left_out(engine),
        "sent": engine.broadcast(
            {"x": torch.tensor([rank]), "name": f"rank {rank}"}, from_process=1
        ),
    }


def test_uneven_tensors_flags_and_objects(two: dict[str, Any]):
    found = two["uneven"]
    assert found["gathered"] == ([0, 0, 1], [0.0, 1.0])
    assert found["padded"] == [[1, 1], [-1, -1], [1, 1], [1, 1]]
    assert found["triggers"] == (True, False)
    assert found["left_out"] == pytest.approx(1.0)
    assert found["sent"] == {"x": torch.tensor([1]), "name": "rank 1"}


def mismatch(kind: str) -> None:
    os.environ["LOOPWRIGHT_DEBUG_TIMEOUT"] = "3"
    engine = make(debug=True)
    rank = engine.process_index
    engine.wait_for_everyone()
    engine.gather(torch.ones(2))
    if kind == "shapes":
        engine.gather(torch.ones(2 + rank))
    elif kind == "calls":
        engine.reduce(torch.ones(2)) if rank else engine.gather(torch.ones(2))
    elif rank == 0:
        engine.wait_for_everyone()
    else:
        threading.Event().wait(
            30
        )  # a process that is stuck in something else; it is ended with the others


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "shapes",
            [
                r"rank 0: gather\(float32\[2\]\) at .*test_engine.py:\d+",
                r"rank 1: gather\(float32\[3\]\) at",
            ],
        ),
        (
            "calls",
            [
                r"rank 0: gather\(float32\[2\]\) at .*test_engine.py:\d+",
                r"rank 1: reduce\(float32\[2\]\) at",
            ],
        ),
        (
            "missing",
            [
                r"waits in wait_for_everyone at .*test_engine.py:\d+, and rank 1 has not come within 3 s",
                "gather",
            ],
        ),
    ],
)
def test_debug_mode_names_the_lines_that_differ(kind: str, told: list[str]):
    import re

    with pytest.raises(RuntimeError) as caught:
        in_processes(2, mismatch, kind)
    for pattern in told:
        assert re.search(pattern, told_by(caught.value)), told_by(caught.value)


# -- memory -----------------------------------------------------------------------------------------------------------


def search(place: str) -> Any:
    """A training of which the last rank runs out of memory above 4 samples, while the others wait for it."""
    sizes: list[int] = []
    engine = make()

    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int, power: float) -> Any:
        sizes.append(batch_size)
        engine.free_memory()
        engine.gradient_accumulation_steps = 16 // batch_size
        model = nn.Linear(4, 1)
        model, optimizer, loader = engine.prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(regression(64), batch_size=batch_size),
        )
        full = batch_size > 4 and engine.process_index == engine.num_processes - 1

        def fail(
            _: Tensor,
        ) -> None:  # when the bias has its gradient, and the weight has none
            raise torch.OutOfMemoryError("the device is full")

        for batch_idx, (x, y) in enumerate(loader):
            if full and batch_idx == 1 and place == "backward":
                model.weight.register_hook(fail)
            with engine.accumulate(model):
                if full and batch_idx == 1 and place == "forward":
                    raise torch.OutOfMemoryError("the device is full")
                loss = (model(x) - y).abs().pow(power).mean()
                engine.backward(loss)
                if full and batch_idx == 1 and place == "step":
                    raise RuntimeError("CUDA error: out of memory")
                optimizer.step()
                optimizer.zero_grad()
        if full and place == "end":
            raise torch.OutOfMemoryError("the device is full")
        return (
            batch_size,
            engine.reduce(torch.tensor(1.0)).item(),
            [p.detach().clone() for p in model.parameters()],
        )

    torch.manual_seed(0)
    return train(2.0), sizes


PLACES = ("forward", "backward", "step", "end")


def search_at_all_places() -> Any:
    return {place: search(place) for place in (*PLACES, "nowhere")}


@pytest.fixture(scope="module", params=[1, 2])
def searches(request: pytest.FixtureRequest) -> Any:
    return (
        request.param,
        search_at_all_places()
        if request.param == 1
        else request.getfixturevalue("two")["searches"],
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_batch_size_that_fits_is_found_by_all_processes_together(
    searches: Any, place: str
):
    processes, found = searches
    (size, count, weights), sizes = found[place]
    whole = found["nowhere"]
    assert (size, count) == (4, processes)
    assert sizes == [16, 8, 4]
    assert whole[1] == [16]
    if (
        processes == 1
    ):  # in two, an accumulation of smaller batches takes them in another order
        torch.testing.assert_close(weights, whole[0][2])


def test_no_batch_size_fits_and_other_errors_pass():
    @find_executable_batch_size(starting_batch_size=4)
    def never(batch_size: int) -> None:
        raise torch.OutOfMemoryError("the device is full")

    @find_executable_batch_size(starting_batch_size=4)
    def wrong(batch_size: int) -> None:
        raise ValueError("another mistake")

    with pytest.raises(
        RuntimeError, match=r"never runs out of memory with the smallest"
    ):
        never()
    with pytest.raises(ValueError, match="another mistake"):
        wrong()
    with pytest.raises(TypeError, match="gets its batch_size from"):
        never(8)


# -- the end ----------------------------------------------------------------------------------------------------------


def threads_and_files() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def one_after_the_other(count: int) -> Any:
    found = []
    for _ in range(count):
        engine = make(precision="bf16-mixed")
        model = nn.Linear(512, 512)
        model, optimizer, loader = engine.prepare(
            model,
            torch.optim.AdamW(model.parameters()),
            DataLoader(TensorDataset(torch.randn(16, 512)), batch_size=4),
        )
        x = None
        for (x,) in loader:
            engine.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        total = engine.reduce(torch.tensor(1.0)).item()
        engine.end_training()
        assert total == engine.num_processes
        del engine, model, optimizer, loader, x
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        found.append((torch.distributed.is_initialized(), *threads_and_files(), pages))
    return found


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"),
    reason="counts threads and files as Linux shows them",
)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_20_engines_leave_nothing_behind(processes: int):
    found = in_processes(processes, one_after_the_other, 20)
    assert not any(initialized for initialized, *_ in found)
    _, threads, files, pages = found[2]
    _, last_threads, last_files, last_pages = found[-1]
    assert (
        last_threads - threads < 9
    )  # a thread or socket may still be closing; one that stays would make 17
    assert last_files - files < 9
    assert (
        last_pages - pages < 5000
    )  # 20 MB; 17 models with their optimizers would have 70


def test_a_function_is_launched_with_what_a_notebook_defines():
    factor = 3

    def work(x: int) -> Any:
        engine = Engine(accelerator="cpu")
        return engine.num_processes, engine.reduce(torch.tensor(x * factor)).item()

    assert launch(work, (2,), num_processes=2) == (2, 12)
    assert launch(work, (2,), num_processes=1) == (1, 6)


def test_several_devices_without_a_script_say_how_to_launch():
    with pytest.raises(RuntimeError, match=r"launch\(function, num_processes=2\)"):
        make(devices=2)


def test_values_are_logged_by_the_main_process(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    engine = make(logger=logger)
    engine.log({"loss": torch.tensor(0.5)})
    engine.log({"loss": 0.25}, step=7)
    engine.end_training()
    rows = Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [
        dict(zip(rows[0].split(","), row.split(","), strict=True))["step"]
        for row in rows[1:]
    ] == ["0", "7"]
    assert "0.25" in rows[2]


class Anything(Logger):
    """Takes whatever comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append(metrics)


def test_rows_hold_what_the_loggers_take(tmp_path: Path):
    """Numbers arrive as such; the rest as it is, and a logger that cannot take it names it."""
    anything = Anything()
    several = torch.ones(3)
    row = {
        "loss": torch.tensor([1.5]),
        "acc": np.float32(0.25),
        "n": 7,
        "note": "text",
        "by": {"a": 1.0},
        "none": None,
    }
    make(logger=anything).log({**row, "several": several})
    expected = {
        "loss": 1.5,
        "acc": 0.25,
        "n": 7.0,
        "note": "text",
        "by": {"a": 1.0},
        "none": None,
        "several": several,
    }
    assert anything.rows == [expected]
    assert type(anything.rows[0]["loss"]) is float
    for kind, taken in ((CSVLogger, ()), (TensorBoardLogger, ("by",))):
        engine = make(logger=kind(tmp_path))
        for name, value in {**row, "several": several}.items():
            if name in ("loss", "acc", "n", *taken):
                engine.log({name: value})
                continue
            with pytest.raises(
                ValueError, match=rf"{kind.__name__} takes numbers.*'{name}' is"
            ):
                engine.log({name: value})
        engine.end_training()


def log_in_order(path: str) -> str:
    engine = make()
    logger = get_logger("a.test", "INFO")
    logger.logger.addHandler(logging.FileHandler(path))
    logger.info("once")
    logger.info("each", main_process_only=False, in_order=True)
    engine.wait_for_everyone()
    return Path(path).read_text(encoding="utf-8")


def test_a_logger_speaks_once_or_in_order(two: dict[str, Any]):
    assert two["logged"].splitlines() == [
        "[rank 0] once",
        "[rank 0] each",
        "[rank 1] each",
    ]


def test_a_logger_names_its_caller(caplog: pytest.LogCaptureFixture):
    """Whose line it is: also one level up, for those who wrap it."""

    def wrapper(text: str) -> None:
        logger.warning(text, stacklevel=2)

    logger = get_logger("b.test")
    logger.warning("of a method")
    logger.log(logging.ERROR, "of log")
    wrapper("of the wrapper's caller")
    if sys.version_info < (3, 11):
        caplog.records.pop(1)  # there it is the frame above
    assert {record.funcName for record in caplog.records} == {
        "test_a_logger_names_its_caller"
    }
    assert {record.pathname for record in caplog.records} == {__file__}


def test_a_logger_warns_once(caplog: pytest.LogCaptureFixture):
    """For each message with its arguments, whichever logger of that name says it; the line is the caller's."""
    for _ in range(2):
        get_logger("c.test").warning_once("%d batches are short", 3)
        get_logger("c.test").warning_once(
            "%d batches are short", 4, main_process_only=False
        )
        get_logger("d.test").warning_once("%d batches are short", 3)
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert told == [
        (name, f"{n} batches are short")
        for name, n in (("c.test", 3), ("c.test", 4), ("d.test", 3))
    ]
    assert {record.funcName for record in caplog.records} == {
        "test_a_logger_warns_once"
    }
    assert {record.pathname for record in caplog.records} == {__file__}
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_model_is_spread_over_cpu_and_disk(tmp_path: Path):
    pytest.importorskip("accelerate")
    model = network().eval()
    x = torch.randn(3, 4)
    expected = model(x)
    engine = make(strategy="single", devices=1)
    spread: Any = engine.dispatch_model(
        model,
        {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"},
        offload_dir=str(tmp_path),
        main_device="cpu",
    )
    assert next(spread[3].parameters()).device.type == "meta"
    with torch.no_grad():
        assert torch.equal(spread(x), expected)


class Whole(SingleDeviceStrategy):
    """Prepares one module only, as DeepSpeed does; notes how it is torn down."""

    capabilities = Capabilities(single_module=True)

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[bool] = []

    def teardown(self, interrupted: bool = False) -> None:
        self.ends.append(interrupted)


def test_forgetting_after_memory_ran_out_meets_nobody() -> None:
    """The other processes may be anywhere; else the strategy gives back what it has trained, with all of them."""
    engine = Engine(accelerator="cpu", devices=1, strategy=(strategy := Whole()))

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size: int) -> int:
        module = nn.Linear(2, 1)
        engine.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        if batch_size == 2:
            raise torch.OutOfMemoryError
        return batch_size

    assert train() == 1
    assert strategy.ends == [True]
    engine.free_memory()
    assert strategy.ends == [True, False]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("prepares_first", [True, False])
def test_a_loss_scaler_of_ones_own(precision: str, prepares_first: bool) -> None:
    """Scales from then on, and the optimizers step on gradients of their true size."""
    engine = make(devices=1, precision=precision)
    model: Any = nn.Linear(2, 1)
    weight = model.weight.detach().clone()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    if prepares_first:
        model, optimizer = engine.prepare(model, optimizer)
        engine.scaler = scaler
    else:
        engine.scaler = scaler
        model, optimizer = engine.prepare(model, optimizer)
    assert engine.scaler is scaler
    for scale in (4.0, 8.0):
        optimizer.zero_grad()
        with engine.accumulate(model):
            engine.backward(model(torch.ones(1, 2)).sum())
            assert model.weight.grad.tolist() == [[scale, scale]]
            optimizer.step()
        assert not engine.step_was_skipped
        weight -= 1
        torch.testing.assert_close(model.weight.detach(), weight)
    optimizer.zero_grad()
    with engine.accumulate(model):
        engine.backward(model(torch.full((1, 2), torch.inf)).sum())
        optimizer.step()
    assert engine.step_was_skipped
