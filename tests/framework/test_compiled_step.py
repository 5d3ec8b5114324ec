"""``compile="step"``: one graph for forward, backward and the optimizer, and what stands against it."""

from __future__ import annotations

import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Module, Trainer

# The optimizer computes its bias corrections in single precision in a graph, and in double precision else.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def batches(count: int = 7) -> list[tuple[Tensor, Tensor]]:
    """The last one is smaller, as the last of an epoch often is."""
    generator = torch.Generator().manual_seed(5)
    sizes = [8] * (count - 1) + [5]
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


class Net(Module):
    """Has layers with buffers and random numbers, schedules by counters, and logs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.net: Any = nn.Sequential(
            # A bias before this layer would have no gradient but noise.
            nn.Linear(6, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 3),
        )
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(self.frozen(inputs)), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) * (1 + 0.01 * self.global_step)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"step": self.global_step, "idx": batch_idx})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"])
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.norms.append(nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.01)
        scheduler = CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Graphs:
    """A backend of ``torch.compile`` that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def train(
    folder: Path, module: Module, compile: Any = False, **arguments: Any
) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    trainer = Trainer(compile=compile, **(defaults | arguments))
    data = batches()
    torch.manual_seed(1)
    trainer.fit(module, data, data[:2])
    return trainer


def test_a_step_becomes_one_graph_that_trains_as_without(tmp_path: Path):
    plain, compiled = Net(), Net()
    expected = train(tmp_path, plain, gradient_clip_val=0.5)
    graphs = Graphs()
    scope = {"scope": "step", "backend": graphs}
    with warnings.catch_warnings(record=True) as caught:
        told = train(tmp_path, compiled, scope, gradient_clip_val=0.5)
    # It would be said that a scheduler was stepped before the optimizer.
    assert not [one for one in caught if "lr_scheduler" in str(one.message)]
    # The first, one for counters that are no constants, one for a batch of another size.
    assert graphs.count <= 3
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)
    torch.testing.assert_close(compiled.norms, plain.norms, **CLOSE)
    assert compiled.frozen.weight.grad is None
    torch.testing.assert_close(
        compiled.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4
    )
    values = expected.callback_metrics
    assert set(told.callback_metrics) == set(values)
    torch.testing.assert_close(dict(told.callback_metrics), dict(values), **CLOSE)
    assert told.global_step == expected.global_step == 14
    rates = [
        trainer.optimizers[0].param_groups[0]["lr"] for trainer in (told, expected)
    ]
    assert rates[0] == rates[1]


def test_weights_that_are_frozen_in_the_run_stay(tmp_path: Path):
    class Freezes(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[0].requires_grad_(False)
                self.weight = pl_module.net[0].weight.clone()

    freezes = Freezes()
    module: Any = Net()
    train(tmp_path, module, {"scope": "step", "backend": "eager"}, callbacks=[freezes])
    torch.testing.assert_close(module.net[0].weight, freezes.weight, rtol=0, atol=0)
    assert module.net[0].weight.grad is None


@pytest.mark.slow
def test_resumes_bit_equal(tmp_path: Path):
    class Even(Net):
        def train_dataloader(self) -> Any:
            return batches()[:-1]

    def run(folder: Path, **arguments: Any) -> Net:
        module = Even(dropout=0.3)
        scope = {"scope": "step", "backend": "aot_eager"}
        saves = ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu",
            compile=scope,
            callbacks=[saves],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **arguments,
        )
        torch.manual_seed(1)
        trainer.fit(module, ckpt_path="last")
        return module

    whole = run(tmp_path / "whole", max_epochs=2)
    run(tmp_path / "cut", max_epochs=2, max_steps=8)
    resumed = run(tmp_path / "cut", max_epochs=2)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.losses, whole.losses[8:], rtol=0, atol=0)


class Prints(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        print("in the step")
        return self.loss(batch)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


class HasHook(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


class Masks(Net):
    """Gradients of a part are left out by a hook, as for some rows of an embedding."""

    def on_train_start(self) -> None:
        self.net[0].weight.register_hook(torch.zeros_like)


class Clamped(torch.optim.SGD):
    """Its step is decorated."""

    @wraps(torch.optim.SGD.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-0.2, 0.2)
        return result


class Clamps(Net):
    def configure_optimizers(self) -> Any:
        return Clamped(self.parameters(), lr=0.1)


class Closes(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class Cycles(Net):
    """The scheduler changes the momentum at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Appends(Net):
    """Looks at its own list, which is longer at each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (1 + len(self.losses))


class ShowsImages(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_image("image", torch.zeros(3, 4, 4))
        return self.loss(batch)


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        (Prints, {}, "print"),
        (Unused, {}, "the loss does not depend on all parameters"),
        (HasHook, {}, "HasHook has the hook on_before_optimizer_step"),
        (Masks, {}, "a hook on its gradient"),
        (Clamps, {}, "(step, "),
        (Closes, {}, "takes a closure"),
        (Cycles, {}, "momentum has changed more than 2 times"),
        pytest.param(Appends, {}, "it was compiled 5 times", marks=pytest.mark.slow),
        (ShowsImages, {"logger": "tensorboard"}, "training_step, "),
        (Net, {"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        (Net, {"precision": "16-mixed"}, "the loss is scaled"),
        (Net, {"detect_anomaly": True}, "detect_anomaly"),
    ],
)
def test_what_stands_against_a_graph_is_said_and_the_run_goes_on(
    kind: Any,
    arguments: dict[str, Any],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    plain, compiled = kind(), kind()
    train(tmp_path, plain, **arguments)
    train(tmp_path, compiled, {"scope": "step", "backend": "eager"}, **arguments)
    told = [r.getMessage() for r in caplog.records if 'compile="step"' in r.message]
    assert len(told) == 1
    assert reason in told[0]
    assert len(compiled.losses) == len(plain.losses) == 14
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)


class Changes(Callback):
    """Changes at an epoch's end what the graph had taken for constant."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.gradient_clip_val = 1e-3
        trainer.optimizers[0].param_groups[0]["params"].append(pl_module.late)
        trainer.optimizers[0].param_groups[1]["weight_decay"] = 0.5


class Late(Net):
    """Has a parameter that the optimizer gets later, one that is logged before it is stepped, and an empty group."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(()))
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("scale", self.scale)
        return self.loss(batch) * self.scale * self.late

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.scales.append(float(self.trainer.callback_metrics["scale"]))

    def configure_optimizers(self) -> Any:
        weights = [*self.net.parameters(), self.scale]
        groups = [{"params": weights[:2]}, {"params": weights[2:]}, {"params": []}]
        return AdamW(groups, lr=0.01)


def test_what_changes_in_the_run_is_seen(tmp_path: Path):
    plain, compiled = Late(), Late()
    arguments = {"callbacks": [Changes()], "gradient_clip_val": 10.0}
    train(tmp_path, plain, **arguments)
    train(tmp_path, compiled, {"scope": "step", "backend": "eager"}, **arguments)
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)
    torch.testing.assert_close(compiled.scales, plain.scales, **CLOSE)
    assert plain.late != 1
    torch.testing.assert_close(compiled.late, plain.late, **CLOSE)


def test_an_error_of_the_step_is_the_users_own(tmp_path: Path):
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise KeyError("my own")
            return self.loss(batch)

    with pytest.raises(KeyError, match="my own"):
        train(tmp_path, Fails(), {"scope": "step", "backend": "eager"})


def test_weights_of_batches_are_counted(tmp_path: Path):
    class Weighs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "weight": len(batch[0]), "note": "mine"}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            assert outputs["note"] == "mine"
            assert not outputs["loss"].requires_grad

    plain, compiled = Weighs(), Weighs()
    expected = train(tmp_path, plain)
    told = train(tmp_path, compiled, {"scope": "step", "backend": "eager"})
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)
    tokens = [trainer.state.tokens.total for trainer in (told, expected)]
    assert tokens[0] == tokens[1] == 2 * (6 * 8 + 5)


@pytest.mark.parametrize("compile", ["whole", {"scope": "all"}, 3])
def test_what_compile_does_not_know_is_an_error(compile: Any):
    with pytest.raises(ValueError, match="compile must be"):
        Trainer(compile=compile)


@pytest.mark.slow
def test_the_compilers_own_graph_trains_as_without(tmp_path: Path):
    plain, compiled = Net(), Net()
    train(tmp_path, plain)
    train(tmp_path, compiled, "step")
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_do_not_overwrite_what_was_returned(tmp_path: Path):
    plain, compiled = Net(), Net()
    train(tmp_path, plain, accelerator="gpu", devices=1)
    scope = {"scope": "step", "mode": "reduce-overhead"}
    train(tmp_path, compiled, scope, accelerator="gpu", devices=1)
    torch.testing.assert_close(compiled.losses, plain.losses, **CLOSE)
