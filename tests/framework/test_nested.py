"""Modules inside modules, and runs inside runs: whose Trainer a module has, and what it is given back with."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from loopwright.callbacks import Callback
from loopwright.framework import DataModule, Module, Trainer
from tests.framework.models import Evaluated, loader, quiet, weights

# -- modules inside a module ----------------------------------------------------------------------------------------


class Member(Module):
    """Logs in its own step, as if it were trained alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layer, self.mean = name, nn.Linear(2, 1), MeanMetric()
        self.epochs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.mean.update(loss.detach())
        self.log(f"{self.name}_loss", loss, on_step=False, on_epoch=True)
        self.log(f"{self.name}_metric", self.mean, on_step=False, on_epoch=True)
        self.epochs.append(self.current_epoch)
        return loss


class Ensemble(Module):
    """Members in a list, inside a module that is none of ours, and made only when the run has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([Member("a"), Member("b")])
        self.deep = nn.Sequential(nn.ModuleDict({"c": Member("c")}))
        self.late: Member | None = None

    def configure_model(self) -> None:
        if self.late is None:
            self.late = Member("late")

    @property
    def members(self) -> list[Any]:
        return [*self.several, self.deep[0]["c"], self.late]  # type: ignore[index] # a ModuleDict

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        total = torch.stack(
            [member.training_step(batch, batch_idx) for member in self.members]
        ).sum()
        self.log("total", total, on_step=False, on_epoch=True)
        return total

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_inner_modules_have_the_outer_ones_trainer() -> None:
    """At any depth: what they log arrives, and they know how far the run is."""
    module, trainer = Ensemble(), quiet(max_epochs=2)
    trainer.fit(module, loader())
    logged = trainer.callback_metrics
    for kind in ("loss", "metric"):
        parts = torch.stack(
            [logged[f"{name}_{kind}"] for name in ("a", "b", "c", "late")]
        )
        torch.testing.assert_close(parts.sum().float(), logged["total"].float())
    for member in module.members:
        assert member.epochs == [0] * 4 + [1] * 4
        assert member.trainer is trainer
        assert member.global_step == 8
    module.trainer = other = quiet()  # as tests of a module do
    assert all(member.trainer is other for member in module.members)


# -- runs inside a run ----------------------------------------------------------------------------------------------


class Dropping(Evaluated):
    """Dropout, a batch norm, a frozen layer, a metric over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
        )
        self.layer[0].requires_grad_(False)
        self.inner, self.mean, self.logged = Member("inner"), MeanMetric(), []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("train_loss", loss, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.mean.update(self.loss(batch))
        super().validation_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=0.1
        )


class Inside(Callback):
    """Calls ``act`` in a hook of a fit, but not in that of a run that it calls."""

    def __init__(self, hook: str, act: Callable[[Trainer, Any], Any]) -> None:
        self.act, self.running = act, False
        setattr(self, hook, self.run)

    def run(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if not self.running:
            self.running = True
            self.act(trainer, module)
            self.running = False


def fit(*callbacks: Callback) -> tuple[Any, Trainer]:
    torch.manual_seed(3)
    module, trainer = (
        Dropping(),
        quiet(*callbacks, max_epochs=2, accumulate_grad_batches=3),
    )
    trainer.fit(module)
    return module, trainer


def otherwise(trainer: Trainer, module: Any) -> None:
    """Evaluate in numbers that the outer run's would not survive, without gradients, under other settings."""
    quiet(precision="bf16-true", deterministic=True).validate(module, verbose=False)
    quiet(benchmark=True).validate(module, verbose=False)


def failing(trainer: Trainer, module: Any) -> None:
    """An evaluation that ends by an exception, which the hook expects."""
    with pytest.raises(ZeroDivisionError):
        quiet(Inside("on_test_batch_end", lambda *_: 1 / 0)).test(module, verbose=False)


def frozen(trainer: Trainer, module: Any) -> None:
    """An evaluation before which somebody freezes the module, in its own run."""
    quiet(Inside("on_predict_start", lambda _, m: m.freeze())).predict(module)


def a_part(trainer: Trainer, module: Any) -> None:
    """A run of a module inside the outer one, with data that is nobody else's."""
    with torch.random.fork_rng():  # what making it draws
        wrapped = Wrapped(module.inner)
    quiet(precision="64-true").predict(wrapped, loader())


class Wrapped(Evaluated):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part


ACTS = [
    lambda trainer, module: quiet().predict(module),
    lambda trainer, module: quiet().validate(module, verbose=False),
    otherwise,
    failing,
    frozen,
    a_part,
]
HOOKS = [
    "on_train_epoch_end",
    "on_validation_epoch_end",
    "on_validation_batch_end",
    "on_train_batch_end",
]


@pytest.mark.parametrize("act", ACTS)
def test_a_run_in_a_hook_leaves_the_outer_one_as_it_was(act: Any) -> None:
    """Weights, values and settings are those of the run without it, in whatever hook and inside a window, too."""
    plain, alone = fit()
    for hook in HOOKS:
        module, trainer = fit(Inside(hook, act))
        assert all(
            map(torch.equal, module.state_dict().values(), plain.state_dict().values())
        ), hook
        assert trainer.callback_metrics == alone.callback_metrics, hook
        assert module.trainer is module.inner.trainer is trainer
        assert [p.requires_grad for p in module.parameters()] == [
            p.requires_grad for p in plain.parameters()
        ]
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark


def test_a_fit_in_a_hook_gives_the_trained_weights_back() -> None:
    """In the outer run's numbers, with the gradients of the window that is open there."""
    seen: dict[str, Any] = {}

    def train(trainer: Trainer, module: Any) -> None:
        if trainer.batch_idx != 1:
            return
        handlers = [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
        ]
        before, gradients = (
            weights(module),
            [copy.copy(p.grad) for p in module.parameters()],
        )
        quiet(precision="64-true").fit(module)
        assert not all(map(torch.equal, before, weights(module)))
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert handlers == [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
        ]
        after = [p.grad for p in module.parameters()]
        seen["gradients"] = [
            a is None if b is None else torch.equal(a, b)
            for a, b in zip(after, gradients, strict=True)
        ]

    fit(Inside("on_after_backward", train))
    assert all(seen["gradients"])


@pytest.mark.parametrize("outer", ["fit", "test"])
def test_another_module_may_be_trained_in_a_hook_of_an_evaluation(outer: str) -> None:
    """Where gradients are switched off, as for a probe of the features."""
    ready, probes = Evaluated(), []

    def probe(trainer: Trainer, module: Any) -> None:
        before = weights(ready)
        quiet(precision="64-true").fit(ready, loader())
        assert not any(map(torch.equal, before, weights(ready)))
        assert not torch.is_grad_enabled()
        probes.append(Evaluated())
        if (
            torch.is_inference_mode_enabled()
        ):  # which no tensor survives that was made in it
            with pytest.raises(
                ValueError, match="inference_mode=False to the Trainer that evaluates"
            ):
                quiet().fit(probes[0], loader())
        else:
            quiet().fit(probes[0], loader())

    trainer = quiet(
        Inside(
            "on_validation_epoch_end" if outer == "fit" else "on_test_epoch_end", probe
        )
    )
    getattr(trainer, outer)(Dropping())
    assert len(probes) == 1


def test_a_trainer_that_is_running_is_not_run() -> None:
    """The error says what to do instead; the outer run may go on, and the Trainer runs again when it has ended."""
    messages = []

    def again(trainer: Trainer, module: Any) -> None:
        for run in (trainer.validate, trainer.fit, trainer.predict):
            with pytest.raises(RuntimeError, match="another Trainer there") as raised:
                run(module)
            messages.append(str(raised.value))
        twin = copy.deepcopy(trainer)  # which is not running
        twin.predict(copy.deepcopy(module))

    _, trainer = fit(Inside("on_train_epoch_end", again))
    assert messages[0].startswith(
        "validate was called while this Trainer is running fit"
    )
    assert len(messages) == 6
    trainer.validate(verbose=False)


def test_a_trainer_whose_run_failed_early_runs_again() -> None:
    """What fails before the run's hooks leaves no Trainer that thinks it runs."""

    class Wrong(Evaluated):
        def configure_callbacks(self) -> Any:
            return [3]

    trainer = quiet()
    with pytest.raises(TypeError, match="callbacks must hold"):
        trainer.fit(Wrong(), loader())
    trainer.fit(Evaluated(), loader())


def test_an_evaluation_that_fails_leaves_the_training_mode() -> None:
    """Also where nothing runs around it: a fit that follows trains with dropout."""
    module, trainer = Dropping(), quiet()
    with pytest.raises(ZeroDivisionError):
        quiet(Inside("on_validation_batch_end", lambda *_: 1 / 0)).validate(
            module, verbose=False
        )
    assert all(part.training for part in module.modules())
    trainer.fit(module)


def test_a_module_and_its_data_stay_with_the_trainer_that_ran_them() -> None:
    """After runs that follow each other, the last one's; after one in a hook, the outer one's."""

    @dataclass
    class Data(DataModule):  # which cannot be hashed
        size: int = 2

        def val_dataloader(self) -> Any:
            return DataLoader(loader().dataset, batch_size=2)

    module, data, inner = Evaluated(), Data(), quiet()
    owners = []

    def validate(trainer: Trainer, running: Any) -> None:
        inner.validate(running, datamodule=data, verbose=False)
        owners.append((running.trainer is trainer, data.trainer is trainer))

    outer = quiet(Inside("on_train_epoch_end", validate))
    outer.fit(module, loader())
    assert owners == [(True, False)]  # the data was nobody's before
    inner.validate(module, datamodule=data, verbose=False)
    assert module.trainer is data.trainer is inner
