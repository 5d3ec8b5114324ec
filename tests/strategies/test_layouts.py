"""How a model can be laid out over processes: each way trains as one process does, and its checkpoints are plain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Engine, Module
from loopwright.strategies import FSDPStrategy, Strategy
from tests.strategies.distributed import in_processes, quiet

STEPS = 6


def data(batch_size: int, samples: int = 48) -> DataLoader[Any]:
    x = torch.randn(samples, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size)


class Net(Module):
    """Made in ``configure_model``, where layers may be parallelized."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module | None = None
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.body is not None:
            return
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(16, 34), nn.GELU(), nn.Linear(34, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.body is not None
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("v", (self(batch[0]) - batch[1]).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Parallel(Net):
    """Where a Trainer has a mesh, each of two processes has half of the body's inner features."""

    def configure_model(self) -> None:
        made_now = self.body is None
        super().configure_model()
        if made_now and "_trainer" in self.__dict__ and self.device_mesh is not None:
            assert self.body is not None
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.body, self.device_mesh["tensor_parallel"], plan)


LAYOUTS: dict[str, tuple[type[Net], Any]] = {
    "ddp": (Net, "ddp"),
    "default": (Net, "fsdp"),
    "offloaded": (Net, "fsdp_cpu_offload"),
    "kept gathered": (Net, lambda: FSDPStrategy(reshard_after_forward=False)),
    "by class": (Net, lambda: FSDPStrategy(auto_wrap_policy={nn.Linear})),
    "by size": (Net, lambda: FSDPStrategy(auto_wrap_policy=300)),
    "by function": (Net, lambda: FSDPStrategy(auto_wrap_policy=lambda part: isinstance(part, nn.LayerNorm))),
    "activations again": (Net, lambda: FSDPStrategy(activation_checkpointing=nn.Sequential)),
    "replicated": (Net, lambda: FSDPStrategy(device_mesh=(2, 1))),
    "tensor parallel": (Parallel, lambda: FSDPStrategy(tensor_parallel_size=2)),
    "ZeRO-1 offloaded": (Net, "deepspeed_stage_1_offload"),
    "ZeRO-2 offloaded": (Net, "deepspeed_stage_2_offload"),
    "ZeRO-3, made in parts": (Net, "deepspeed_stage_3"),
    "ZeRO-3 offloaded": (Net, "deepspeed_stage_3_offload"),
}


def train(path: str, layout: str, batch_size: int) -> list[float]:
    kind, strategy = LAYOUTS[layout]
    strategy = strategy() if callable(strategy) else strategy
    module = kind()
    trainer = quiet(strategy=strategy, max_steps=STEPS, gradient_clip_val=0.5)
    trainer.fit(module, data(batch_size), data(5, 37))
    losses = trainer.strategy.reduce(torch.stack(module.losses)).tolist()
    trainer.save_checkpoint(path)
    return [*losses, float(trainer.callback_metrics["v"])]


def train_all(folder: Path) -> dict[str, list[float]]:
    return {name: train(str(folder / name), name, 8 if name == "tensor parallel" else 4) for name in LAYOUTS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("layouts")
    found = in_processes(2, train_all, folder)
    found["in two dimensions"] = in_processes(4, train, str(folder / "in two dimensions"), "tensor parallel", 4)
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, "in two dimensions"])
def test_each_layout_trains_as_one_process_does(trained: tuple[Path, dict[str, list[float]]], layout: str):
    folder, found = trained
    assert found[layout] == pytest.approx(found["ddp"], rel=2e-6)
    expected = Net.load_from_checkpoint(str(folder / "ddp")).state_dict()
    saved = Net.load_from_checkpoint(str(folder / layout)).state_dict()
    assert saved.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(saved[name], expected[name], rtol=1e-5, atol=1e-6)


# -- one run after another --------------------------------------------------------------------------------------------


def again(folder: Path) -> dict[str, Any]:
    """Fit, test, fit on, test, predict, export; then another Trainer validates the same module."""
    found = {}
    for strategy in ("ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        module = Net()
        trainer = quiet(strategy=strategy)
        trainer.fit(module, data(4), data(4))
        first = trainer.test(module, data(4), verbose=False)
        trainer.max_epochs = 2
        trainer.fit(module, data(4), data(4))
        second = trainer.test(module, data(4), verbose=False)
        predicted = trainer.predict(module, data(4), return_predictions="all")
        trainer.export(folder / f"{strategy}.safetensors")
        other = quiet(strategy=strategy).validate(module, data(4), verbose=False)
        found[strategy] = (first, second, other, torch.cat(predicted))
    return found


@pytest.mark.slow
def test_runs_follow_each_other(tmp_path: Path):
    found = in_processes(2, again, tmp_path)
    expected = found["ddp"]
    from safetensors.torch import load_file

    for strategy, told in found.items():
        for mine, theirs in zip(told[:3], expected[:3], strict=True):
            assert mine[0]["v"] == pytest.approx(theirs[0]["v"], rel=1e-5), strategy
        torch.testing.assert_close(told[3], expected[3], rtol=1e-4, atol=1e-5)
        weights, plain = (load_file(tmp_path / f"{name}.safetensors") for name in (strategy, "ddp"))
        for name in plain:
            torch.testing.assert_close(weights[name], plain[name], rtol=1e-4, atol=1e-5)


# -- the Engine -------------------------------------------------------------------------------------------------------


def own_loop(strategy: str | Strategy, batch_size: int, path: str, load: bool = False) -> list[float]:
    """Two epochs; a checkpoint after five windows, or on from there."""
    engine = Engine(accelerator="cpu", strategy=strategy, launch=False, gradient_accumulation_steps=2)
    engine.connect()
    module = Net()
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
    model, optimizer, loader, scheduler = engine.prepare(module, optimizer, data(batch_size, 44), scheduler)
    if load:
        engine.load_state(path)
    losses = []
    while loader.epoch < 2:
        for x, y in loader:
            with engine.accumulate(model):
                loss = (model(x) - y).square().mean()
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(engine.reduce(loss.detach() * loader.share, "mean")))
            if not load and engine.global_step == 5 and engine.sync_gradients:
                engine.save_state(path)
    model.eval()
    with torch.no_grad():
        predicted = [engine.gather_for_metrics(model(x)) for x, _ in engine.prepare(data(batch_size, 44))]
    losses.append(float(torch.cat(predicted).sum()))
    engine.end_training()
    return losses


STRATEGIES = ("ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def own_loops(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for strategy in STRATEGIES:
        found[strategy] = own_loop(strategy, 4, str(folder / strategy)), []
    for strategy, saved_by in zip(STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True):
        found[strategy][1].extend(own_loop(strategy, 4, str(folder / saved_by), load=True))
    return found


@pytest.mark.slow
def test_an_own_loop_runs_unchanged_under_each_strategy(tmp_path: Path):
    """With the losses of one process; and goes on from what another strategy has saved."""
    found = in_processes(2, own_loops, tmp_path)
    alone = own_loop("single", 8, str(tmp_path / "single"))
    for strategy, (whole, resumed) in found.items():
        assert whole == pytest.approx(alone, rel=1e-5), strategy
        assert resumed == pytest.approx(whole[len(whole) - len(resumed) :], rel=2e-6), strategy
        assert len(resumed) == len(whole) - 10, strategy
    assert os.path.isdir(tmp_path / "fsdp" / "model")
