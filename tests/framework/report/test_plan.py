"""Plans: what they reckon against what a training takes, and that they change nothing."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from benchmarks import planning
from loopwright.framework import DataModule, Module, Trainer
from loopwright.framework.command_line.main import main
from loopwright.framework.report.plan import Plan
from loopwright.framework.report.plan.tracker import Tracker

WIDTH = 64
LAYERS = 4
BATCH = 8
PARAMETERS = 4 * LAYERS * WIDTH * WIDTH  # bytes
STRATEGIES = ("single", "ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3")


class Stack(Module):
    """Linear layers, with as many bytes of parameters as ``PARAMETERS`` says."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, **options: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )
        self.optimizer = optimizer
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return self.optimizer(parameters, **self.options)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Blocks(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(LAYERS)))


def data(batch_size: int = BATCH, **options: Any) -> DataLoader[Any]:
    dataset = TensorDataset(torch.randn(4 * BATCH, WIDTH))
    return DataLoader(dataset, batch_size, **options)


def trainer(devices: int = 1, strategy: Any = "auto", **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        barebones=True,
        max_steps=3,
        **options,
    )


def plan(module: Module, batch: Any = None, **options: Any) -> Plan:
    chosen = {"precisions": ["32-true"], "activation_checkpointing": False, **options}
    return trainer().plan(module, data() if batch is None else batch, **chosen)


# -- figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "accumulate", "precision"),
    [
        (Stack, 1, "32-true"),
        (Stack, 2, "bf16-true"),
        (Blocks, 1, "bf16-mixed"),
        (Blocks, 2, "32-true"),
    ],
)
def test_a_plan_is_the_peak_of_the_tensors_of_a_training(
    kind: type[Stack], accumulate: int, precision: str
):
    module = kind()
    loader = data()
    options: Any = {"precision": precision, "accumulate_grad_batches": accumulate}
    planned = trainer(**options).plan(
        module, loader, precisions=[precision], activation_checkpointing=False
    )

    seen = Tracker()
    for tensor in module.parameters():
        seen.count(tensor)
    seen.leave_out(loader.dataset[:][0])
    with seen:
        trainer(**options).fit(module, loader)

    assert planned.estimates[0].peak == pytest.approx(seen.take_peak(), rel=0.02)


def test_the_kinds_of_each_strategy():
    found = {e.strategy: e for e in plan(Stack(), devices=2)}

    def copies(strategy: str, kind: str) -> float:
        return round(getattr(found[strategy], kind) / PARAMETERS, 2)

    kinds = ("parameters", "gradients", "optimizer")
    assert [copies("single", kind) for kind in kinds] == [1, 1, 2]
    assert [copies("ddp", kind) for kind in kinds] == [1, 1, 2]
    assert [copies("fsdp", kind) for kind in kinds] == [0.5, 0.5, 1]
    # DeepSpeed has its part of the parameters once more, and in a step its gradients twice.
    assert [copies("deepspeed_stage_2", kind) for kind in kinds] == [1, 1, 1.5]
    # Each of these parameters is so small that stage 3 keeps it whole as well.
    assert copies("deepspeed_stage_3", "optimizer") == 1.5
    assert found["fsdp"].communication > 0 == found["single"].communication


def test_mixed_precision_keeps_parameters_in_full_precision():
    found = {
        (e.strategy, e.precision): e
        for e in plan(Stack(), devices=2, precisions=["16-mixed", "bf16-true"])
    }
    assert found["single", "16-mixed"].parameters == PARAMETERS
    assert found["single", "bf16-true"].parameters == PARAMETERS / 2
    # In half precision, and a half of it in full.
    assert found["deepspeed_stage_2", "16-mixed"].parameters == PARAMETERS / 2
    assert found["deepspeed_stage_2", "16-mixed"].optimizer >= 1.5 * PARAMETERS


@pytest.mark.parametrize(
    ("optimizer", "options", "copies"),
    [
        (torch.optim.SGD, {}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        (torch.optim.AdamW, {}, 2),
        (torch.optim.AdamW, {"amsgrad": True}, 3),
        (torch.optim.Adafactor, {}, 2 / WIDTH),
    ],
    ids=["SGD", "momentum", "AdamW", "amsgrad", "Adafactor"],
)
def test_an_optimizer_has_the_states_that_it_makes(
    optimizer: Any, options: Any, copies: float
):
    (found,) = plan(Stack(optimizer, **options))
    assert found.optimizer == pytest.approx(copies * PARAMETERS, abs=100)


def test_an_optimizer_with_kernels_of_its_own_is_reckoned_by_its_name():
    class AdamW8bit(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            raise NotImplementedError("no kernel")

    found = plan(Stack(AdamW8bit))
    assert found.estimates[0].optimizer == pytest.approx(PARAMETERS / 2, rel=0.02)
    assert "AdamW8bit" in " ".join(found.notes)


def test_frozen_and_tied_parameters():
    module = Stack()
    layers = list(module.layers)
    layers[0].weight = layers[1].weight
    for layer in layers[2:]:
        layer.requires_grad_(False)

    found = plan(module)
    assert found.num_parameters * 4 == PARAMETERS * 3 / 4
    assert found.num_trained * 4 == PARAMETERS / 4
    (estimate,) = found
    assert estimate.parameters == PARAMETERS * 3 / 4
    assert estimate.gradients == PARAMETERS / 4
    assert estimate.optimizer == pytest.approx(PARAMETERS / 2, abs=100)


def test_checkpointing_and_smaller_batches_take_less():
    found = plan(
        Blocks(), micro_batches=[256, 64], activation_checkpointing=[False, [Block]]
    )
    whole, checkpointed, small, _ = [e.activations or 0 for e in found]
    assert checkpointed < 0.6 * whole
    assert small < 0.4 * whole
    assert found.estimates[1].activation_checkpointing == ("Block",)


@pytest.mark.slow
def test_a_plan_is_near_the_peak_of_two_processes():
    measured = [m["peak"] for m in planning.start("fsdp", "stack", True, "32-true")]
    kind, samples, width, layers, batch = planning.MODELS["stack"]
    with torch.device("meta"):
        module = planning.make_module(kind, width, layers, lambda batch_idx: None)
    loader = DataLoader(samples(batch, width), batch)
    (estimate,) = plan(module, loader, devices=2, strategies=["fsdp"])
    assert estimate.peak == pytest.approx(max(measured), rel=planning.LIMIT)


# -- what fits ------------------------------------------------------------------------------------------------


def test_batches_are_halved_until_something_fits():
    # AdamW takes 4 copies of the parameters, and the whole batch is too much beside.
    size = trainer().plan(Blocks(), data(16), micro_batches=[4], margin=0)
    memory = min(e.peak for e in size)
    found = trainer().plan(Blocks(), data(16), memory=memory, margin=0)

    assert {e.micro_batch for e in found} > {4}
    assert found.best is not None
    assert min(e.micro_batch for e in found) == found.best.micro_batch
    assert "micro_batch=" in found.best.remarks[0]
    assert not next(e for e in found if e.micro_batch == 16).fits


def test_the_arguments_are_the_trainers():
    from loopwright import strategies

    names = {name: getattr(strategies, name) for name in strategies.__all__}
    found = trainer().plan(Blocks(), data(), devices=2, memory="1GB")
    assert {e.strategy for e in found} == set(STRATEGIES)
    for estimate in found:
        made = eval(
            f'Trainer(accelerator="cpu", barebones=True, {estimate.arguments})',
            {"Trainer": Trainer, "Block": Block, **names},
        )
        assert made.strategy.name == estimate.strategy
        assert made.precision == estimate.precision
        assert made.num_devices == estimate.devices
        policy = made.strategy.activation_checkpointing
        assert (policy is not None) == bool(estimate.activation_checkpointing)


def test_a_plan_can_be_printed_and_written(capsys: pytest.CaptureFixture[str]):
    found = plan(Stack(), memory="1KB")
    assert found.best is None
    assert "None of these fits into 900 B" in str(found)

    found = plan(Stack(), devices=[2, 4], memory="1GiB")
    assert json.loads(json.dumps(found.to_dict()))["best"] == 0
    assert found.memory == 2**30
    assert found.usable == int(0.9 * 2**30)
    lines = str(found).splitlines()
    assert "fsdp × 4" in str(found)
    assert f"Trainer({found.estimates[0].arguments})" in lines

    from rich.console import Console

    Console(width=200).print(found)
    assert "deepspeed_stage_3 × 2" in capsys.readouterr().out


def test_what_a_strategy_refuses_does_not_fit():
    found = {e.strategy: e for e in plan(Stack(torch.optim.Adafactor), devices=2)}
    for name in ("fsdp", "deepspeed_stage_2"):
        assert "Adafactor" in (found[name].refused or "")
        assert found[name].fits is False
    assert found["ddp"].refused is None
    assert found["ddp"].fits


# -- before anything is allocated -----------------------------------------------------------------------------


class Huge(Module):
    """52 GB of parameters, if anybody made them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = None

    def configure_model(self) -> None:
        if self.layers is None:
            layers = [nn.Linear(2**15, 2**15, bias=False) for _ in range(12)]
            self.layers = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layers(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_a_model_that_is_too_large_for_this_machine_is_planned():
    module = Huge()
    found = trainer().plan(
        module,
        [torch.empty(1, 2**15)],
        memory="80GB",
        devices=8,
        precisions=["bf16-mixed"],
    )
    fits = {e.strategy for e in found if e.fits}
    assert "fsdp" in fits
    assert "ddp" not in fits
    assert module.layers is None
    assert not list(module.parameters())


def test_a_model_on_the_meta_device_is_planned():
    with torch.device("meta"):
        module = Stack()
    assert plan(module).estimates[0].parameters == PARAMETERS
    assert next(module.parameters()).is_meta


# -- nothing changes ------------------------------------------------------------------------------------------


class Busy(Blocks):
    """Changes whatever it can in its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.seen = 0
        self.outputs: list[Tensor] = []
        self.table: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        self.more = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        random.random()
        hidden = self.norm(self.layers(batch[0])) + torch.randn(1)
        loss = self.more(hidden).square().mean()
        self.outputs.append(loss.detach())
        self.table["loss"] = loss.detach()
        self.eval()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps)]


def test_a_plan_changes_nothing():
    module = Busy()
    optimizer = torch.optim.AdamW(module.parameters())
    gradient = torch.ones(WIDTH)
    module.norm.weight.grad = gradient
    generator = torch.Generator().manual_seed(1)
    loader = data(shuffle=True, generator=generator)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    same = list(map(id, module.parameters()))
    attributes = set(vars(module))
    states = (torch.get_rng_state(), random.getstate(), generator.get_state())
    running = trainer()

    running.plan(module, loader, devices=2)

    assert list(map(id, module.parameters())) == same
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert module.norm.weight.grad is gradient
    assert not optimizer.state
    assert set(vars(module)) == attributes
    assert module.training
    assert (module.seen, module.outputs, module.table) == (0, [], {})
    assert all("forward" not in vars(part) for part in module.modules())
    after = (torch.get_rng_state(), random.getstate(), generator.get_state())
    assert torch.equal(states[0], after[0])
    assert states[1] == after[1]
    assert torch.equal(states[2], after[2])
    assert running.global_step == 0
    assert running.module is None


def test_a_plan_in_the_middle_of_a_run_does_not_disturb_it():
    def losses(plans: bool) -> list[float]:
        torch.manual_seed(0)
        found: list[float] = []

        class Planning(Blocks):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if plans and batch_idx == 1 and not found[1:]:
                    found_plan = self.trainer.plan(self, batch, devices=2)
                    assert found_plan.best is not None
                loss = super().training_step(batch, batch_idx)
                found.append(float(loss))
                return loss

        module = Planning()
        trainer().fit(module, data(shuffle=True))
        return found

    # What it appends to a list that is not the module's stays there.
    assert losses(plans=True)[-2:] == losses(plans=False)[-2:]


# -- steps that cannot be followed ----------------------------------------------------------------------------


class ReadsValues(Stack):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layers(batch[0]).square()
        if loss.mean().item() > 1e9:
            raise AssertionError
        return loss[loss > 0.5].mean()


class Endless(Stack):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layers(batch[0]).mean()
        while loss.item() > 0.5:
            pass
        return loss


class Kernel(Stack):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = self.layers(batch[0]).detach().numpy().sum()
        return self.layers(batch[0]).mean() + float(rows)


class Manual(Stack):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.optimizers().step()


def test_values_that_a_step_reads_are_assumed_and_this_is_said():
    found = plan(ReadsValues())
    assert found.estimates[0].activations is not None
    assert any(".item()" in note for note in found.notes)
    assert any("x[mask]" in note for note in found.notes)


@pytest.mark.parametrize("kind", [Endless, Kernel, Manual])
def test_where_a_step_cannot_be_followed_the_rest_is_reckoned(kind: type[Stack]):
    found = plan(kind(), memory="1GB")
    (estimate,) = found
    assert estimate.activations is None
    assert estimate.fits is None
    assert estimate.peak >= 4 * PARAMETERS
    assert any("activations are unknown" in note for note in found.notes)
    assert "unknown" in str(found)
    # What does not fit without them does not fit.
    assert plan(kind(), memory=PARAMETERS).estimates[0].fits is False


# -- batches --------------------------------------------------------------------------------------------------


class Mapped(Stack):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch.x if isinstance(batch, Record) else batch["x"]
        return self.layers(x).mean()


@dataclass
class Record:
    x: Tensor
    name: str = ""


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([{"x": torch.randn(WIDTH)} for _ in range(BATCH)])


class Data(DataModule):
    def setup(self, stage: str) -> None:
        self.made = TensorDataset(torch.randn(BATCH, WIDTH))

    def train_dataloader(self) -> Any:
        return DataLoader(self.made, BATCH)


def encoding() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding({"x": torch.randn(BATCH, WIDTH)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"x": torch.randn(BATCH, WIDTH)},
        lambda: Record(torch.randn(BATCH, WIDTH)),
        lambda: DataLoader(Stream(), BATCH, num_workers=2),
        encoding,
    ],
    ids=["dict", "dataclass", "stream", "BatchEncoding"],
)
def test_batches_of_any_kind(make: Any):
    found = plan(Mapped(), make(), micro_batches=[BATCH, 2 * BATCH])
    first, second = found
    assert first.micro_batch == BATCH
    assert (second.activations or 0) > (first.activations or 0)


def test_a_sampler_and_a_loader_that_reads_once_are_left_alone():
    class Bucketed(RandomSampler):
        def __iter__(self) -> Any:
            return iter([[0, 1, 2], [3, 4]])

    dataset = TensorDataset(torch.randn(BATCH, WIDTH))
    found = plan(Stack(), DataLoader(dataset, batch_sampler=Bucketed(dataset)))
    assert found.estimates[0].micro_batch == 3

    once = iter(data())
    with pytest.raises(ValueError, match="can be read once only"):
        plan(Stack(), once)
    assert len(list(once)) == 4


def test_a_data_module_is_set_up_in_a_copy():
    source = Data()
    found = trainer().plan(Stack(), datamodule=source)
    assert found.estimates[0].micro_batch == BATCH
    assert not hasattr(source, "made")
    assert source.trainer is None
    with pytest.raises(ValueError, match="has no train_dataloader"):
        trainer().plan(Stack())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, 'such as "80GB" or "24GiB"; got \'much\''),
        ({"devices": 0}, "devices must be numbers of processes from 1; got 0"),
        ({"strategies": ["dp"]}, "strategies must be among single, ddp.*got 'dp'"),
        ({"micro_batches": [0]}, "micro_batches must be numbers of samples from 1"),
        ({"margin": 1}, "margin must be a part of the memory.*got 1"),
        ({"precisions": ["8-mixed"]}, "precision must be"),
        ({"accelerator": "tpu"}, "accelerator must be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(Stack(), **options)


# -- the command ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
from torch import nn
from loopwright.framework import Module, Trainer
from torch.utils.data import DataLoader, TensorDataset

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(int(sys.argv[1]), 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1)
trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(8, int(sys.argv[1]))), 4))
raise AssertionError("it has trained")
"""


def test_the_command_plans_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    fit = Trainer.fit
    Path("train.py").write_text(PROGRAM)
    assert (
        main(["plan", "--memory", "1GB", "--json", "plan.json", "train.py", "32"]) == 0
    )
    out = capsys.readouterr().out
    assert "Net: 66 parameters" in out
    assert "ddp × 2" in out
    found = json.loads(Path("plan.json").read_text())
    assert found["estimates"][0]["fits"]
    assert found["memory"] == 10**9

    options = ["--memory", "100B", "--strategy", "fsdp", "--strategy", "ddp"]
    assert main(["plan", *options, "--devices", "4", "train.py", "32"]) == 1
    out = capsys.readouterr().out
    assert "fsdp × 4" in out
    assert "single" not in out
    assert "None of these fits" in out

    Path("other.py").write_text("print('no training here')")
    assert main(["plan", "-m", "other"]) == 1
    assert "without a call of Trainer.fit" in capsys.readouterr().err
    assert Trainer.fit is fit
    # Nothing was written beside the plan.
    assert {p.name for p in tmp_path.iterdir()} <= {
        "train.py",
        "other.py",
        "plan.json",
        "__pycache__",
    }
    gc.collect()
