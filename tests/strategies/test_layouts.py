"""How a model can be laid out over processes: each way trains as one process does, and its checkpoints are plain."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback
from loopwright.framework import Engine, Module, Trainer
from loopwright.strategies import DDPStrategy, FSDPStrategy, Strategy
from loopwright.strategies.tensor_shards import full_state
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
        self.body = nn.Sequential(
            nn.Linear(16, 34), nn.GELU(), nn.Linear(34, 16), nn.LayerNorm(16)
        )
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
    "by function": (
        Net,
        lambda: FSDPStrategy(
            auto_wrap_policy=lambda part: isinstance(part, nn.LayerNorm)
        ),
    ),
    "activations again": (
        Net,
        lambda: FSDPStrategy(activation_checkpointing=nn.Sequential),
    ),
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
    return {
        name: train(str(folder / name), name, 8 if name == "tensor parallel" else 4)
        for name in LAYOUTS
    }


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("layouts")
    found = in_processes(2, train_all, folder)
    found["in two dimensions"] = in_processes(
        4, train, str(folder / "in two dimensions"), "tensor parallel", 4
    )
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, "in two dimensions"])
def test_each_layout_trains_as_one_process_does(
    trained: tuple[Path, dict[str, list[float]]], layout: str
):
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
        predicted: Any = trainer.predict(module, data(4), return_predictions="all")
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
        weights, plain = (
            load_file(tmp_path / f"{name}.safetensors") for name in (strategy, "ddp")
        )
        for name in plain:
            torch.testing.assert_close(weights[name], plain[name], rtol=1e-4, atol=1e-5)


# -- what a run may meet ----------------------------------------------------------------------------------------------


class Thaws(Callback):
    """Trains the first layer from the second epoch on."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.first(module).requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.first(module).requires_grad_(trainer.current_epoch > 0)

    def first(self, module: Any) -> nn.Module:
        return module.body[0]


class Unused(Net):
    """Has a layer that no step uses, in front of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
        )


class Normed(Net):
    def configure_model(self) -> None:
        super().configure_model()
        self.norm = nn.BatchNorm1d(16)
        self.fixed = nn.Parameter(torch.full((3,), 1.0 + 2**-12), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x)) * self.fixed[0]


def ended(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return full_state(trainer.strategy, trainer.strategy.model_state())


def met(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for strategy in ("ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        told = found[strategy] = {}
        sharded = (
            strategy
            if strategy != "fsdp"
            else FSDPStrategy(reshard_after_forward=False)
        )
        # Evaluated, fitted, another module evaluated, fitted on.
        module, other = Net(), Net()
        trainer = quiet(strategy=sharded)
        trainer.validate(module, data(4), verbose=False)
        trainer.fit(module, data(4), data(4))
        if strategy != "deepspeed_stage_3":
            trainer.validate(other, data(4), verbose=False)
        trainer.max_epochs = 2
        trainer.fit(module, data(4), data(4))
        told["one after another"] = weights_of(trainer)
        # An optimizer that has stepped, and gradients that were left.
        module = Net()
        module.configure_model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for x, y in data(8, 16):
            (module(x) - y).square().mean().backward()
        if strategy in ("ddp", "fsdp"):
            optimizer.step()
        engine = Engine(accelerator="cpu", strategy=strategy, launch=False)
        engine.connect()
        model, optimizer, loader = engine.prepare(module, optimizer, data(4))
        optimizer.zero_grad()
        for x, y in loader:
            engine.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        told["prepared late"] = full_state(
            engine.strategy, engine.prepared.strategies[0].model_state()
        )
        engine.free_memory()
        reference = weakref.ref(module)
        del module, optimizer, model, engine
        gc.collect()
        told["freed"] = reference() is None
        # What is trained changes.
        trainer = quiet(strategy=strategy, max_epochs=2, callbacks=[Thaws()])
        told["thawed"] = ended(lambda trainer=trainer: trainer.fit(Net(), data(4)))
        # Resumed where a parameter has never been stepped.
        options: dict[str, Any] = (
            {"find_unused_parameters": True} if strategy == "ddp" else {}
        )
        unused = DDPStrategy(**options) if options else strategy
        if strategy == "ddp":
            trainer = quiet(strategy="ddp_find_unused_parameters_true", max_steps=4)
            trainer.fit(Unused(), data(4))
            trainer.save_checkpoint(folder / "unused")
        trainer = quiet(strategy=unused, max_steps=9, max_epochs=3)
        trainer.fit(Unused(), data(4), ckpt_path=folder / "unused")
        told["unused"] = weights_of(trainer)
        # Half precision, with a part that is not trained.
        trainer = quiet(strategy=strategy, max_steps=2, precision="bf16-mixed")
        if strategy in ("ddp", "fsdp"):
            trainer.fit(Normed(), data(4))
            told["fixed"] = weights_of(trainer)["fixed"]

        # A save that the others do not take part in.
        class Saves(Callback):
            def on_exception(
                self, trainer: Any, module: Any, exception: BaseException
            ) -> None:
                self.ended = ended(lambda: trainer.save_checkpoint(folder / "late"))

            def on_train_batch_end(self, *_: Any) -> None:
                raise ValueError("a mistake")

        saves = Saves()
        trainer = quiet(strategy=strategy, callbacks=[saves])
        ended(lambda trainer=trainer: trainer.fit(Net(), data(4)))
        told["late save"] = saves.ended
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return in_processes(2, met, tmp_path_factory.mktemp("met"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one after another", "prepared late", "unused"])
def test_the_weights_are_those_of_ddp(told: dict[str, dict[str, Any]], case: str):
    for strategy in ("fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        if case == "prepared late" and strategy != "fsdp":
            continue
        for name, expected in told["ddp"][case].items():
            if case == "one after another" or not name.startswith("aside"):
                torch.testing.assert_close(
                    told[strategy][case][name],
                    expected,
                    rtol=1e-4,
                    atol=1e-5,
                    msg=strategy,
                )


@pytest.mark.slow
def test_a_layer_that_thaws_is_trained_or_refused(told: dict[str, dict[str, Any]]):
    assert told["ddp"]["thawed"] == told["fsdp"]["thawed"] == "finished"
    for strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
        assert "cannot change which parameters are trained" in told[strategy]["thawed"]
        assert "body.0.weight" in told[strategy]["thawed"]


@pytest.mark.slow
def test_what_is_not_trained_keeps_its_digits(told: dict[str, dict[str, Any]]):
    assert (
        told["fsdp"]["fixed"].tolist()
        == told["ddp"]["fixed"].tolist()
        == [1.0 + 2**-12] * 3
    )


@pytest.mark.slow
def test_no_process_waits_for_a_save_after_an_exception(
    told: dict[str, dict[str, Any]],
):
    assert told["ddp"]["late save"] == "finished"
    for strategy in ("fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        assert (
            "no checkpoint can be saved after an exception"
            in told[strategy]["late save"]
        )


@pytest.mark.slow
def test_modules_are_freed(told: dict[str, dict[str, Any]]):
    """DeepSpeed itself keeps those that it has trained."""
    assert told["ddp"]["freed"]
    assert told["fsdp"]["freed"]


def test_a_fit_goes_on_after_another_module_was_evaluated():
    torch.manual_seed(0)
    module, other = Net(), Net()
    trainer = quiet()
    trainer.fit(module, data(4))
    trainer.validate(other, data(4), verbose=False)
    trainer.max_epochs = 2
    trainer.fit(module, data(4))
    whole = Net()
    quiet(max_epochs=2).fit(whole, data(4))
    assert all(
        map(torch.equal, module.state_dict().values(), whole.state_dict().values())
    )


@pytest.mark.slow
def test_weights_come_back_from_processes_that_had_them_in_parts(tmp_path: Path):
    """Where there is no script to run again."""
    module = Net()
    arguments: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="fsdp",
        max_epochs=1,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, data(4))
    alone = Net()
    quiet().fit(alone, data(8))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(
            module.state_dict()[name], expected, rtol=1e-4, atol=1e-5
        )


# -- the Engine -------------------------------------------------------------------------------------------------------


def own_loop(
    strategy: str | Strategy, batch_size: int, path: str, load: bool = False
) -> list[float]:
    """Two epochs; a checkpoint after five windows, or on from there."""
    engine = Engine(
        accelerator="cpu",
        strategy=strategy,
        launch=False,
        gradient_accumulation_steps=2,
    )
    engine.connect()
    module = Net()
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
    prepared: Any = engine.prepare(module, optimizer, data(batch_size, 44), scheduler)
    model, optimizer, loader, scheduler = prepared
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
        predicted = [
            engine.gather_for_metrics(model(x))
            for x, _ in engine.prepare(data(batch_size, 44))
        ]
    losses.append(float(torch.cat(predicted).sum()))
    engine.end_training()
    return losses


STRATEGIES = (
    "ddp",
    "fsdp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
)


def own_loops(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for strategy in STRATEGIES:
        found[strategy] = own_loop(strategy, 4, str(folder / strategy)), []
    for strategy, saved_by in zip(
        STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True
    ):
        found[strategy][1].extend(
            own_loop(strategy, 4, str(folder / saved_by), load=True)
        )
    return found


@pytest.mark.slow
def test_an_own_loop_runs_unchanged_under_each_strategy(tmp_path: Path):
    """With the losses of one process; and goes on from what another strategy has saved."""
    found = in_processes(2, own_loops, tmp_path)
    alone = own_loop("single", 8, str(tmp_path / "single"))
    for strategy, (whole, resumed) in found.items():
        assert whole == pytest.approx(alone, rel=1e-5), strategy
        assert resumed == pytest.approx(whole[len(whole) - len(resumed) :], rel=2e-6), (
            strategy
        )
        assert len(resumed) == len(whole) - 10, strategy
    assert os.path.isdir(tmp_path / "fsdp" / "model")
