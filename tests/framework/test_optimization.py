"""Optimizers and schedulers: what configure_optimizers may return, windows, weights, precisions, manual steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback
from loopwright.framework import Module
from loopwright.strategies import Precision
from tests.framework.models import Evaluated, Linear, Told, loader, quiet, weights


def sgd(module: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr)


def step_lr(optimizer: torch.optim.Optimizer) -> StepLR:
    return StepLR(optimizer, step_size=1, gamma=0.5)


# -- what configure_optimizers may return ---------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "optimizer": (lambda o, s: o, 0),
    "list": (lambda o, s: [o], 0),
    "tuple": (lambda o, s: (o,), 0),
    "two lists": (lambda o, s: ([o], [s]), 1),
    "a list and a scheduler": (lambda o, s: ([o], s), 1),
    "a list and no scheduler": (lambda o, s: ([o], []), 0),
    "a list and None": (lambda o, s: ([o], [None]), 0),
    "lists with dicts": (
        lambda o, s: ([o], [{"scheduler": s, "interval": "epoch"}]),
        1,
    ),
    "dict": (lambda o, s: {"optimizer": o}, 0),
    "dict with scheduler": (lambda o, s: {"optimizer": o, "lr_scheduler": s}, 1),
    "dict with None": (lambda o, s: {"optimizer": o, "lr_scheduler": None}, 0),
    "dict with dict": (
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "name": "x"}},
        1,
    ),
    "list of dicts": (lambda o, s: [{"optimizer": o, "lr_scheduler": s}], 1),
    "None beside it": (lambda o, s: [None, o], 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    """Each trains, and has the schedulers that it names."""
    make, schedulers = FORMS[form]

    def configure(module: Module) -> Any:
        optimizer = sgd(module)
        return make(optimizer, step_lr(optimizer))

    module = Linear(optimizers=configure)
    before, trainer = weights(module), quiet(max_epochs=2)
    trainer.fit(module, loader())
    assert not any(map(torch.equal, before, weights(module)))
    assert len(trainer.optimizers) == 1
    assert len(trainer.lr_scheduler_configs) == schedulers
    # A scheduler of the form "optimizer" and the like was made but not returned: it never steps.
    assert trainer.optimizers[0].param_groups[0]["lr"] == (
        0.1 * 0.25 if schedulers else 0.1
    )


class Manual(Linear):
    """One or two layers, each with an optimizer, in manual optimization."""

    def __init__(self, optimizers: Callable[[Any], Any] | None = None) -> None:
        super().__init__(optimizers=optimizers)
        self.other = nn.Linear(2, 1)
        self.automatic_optimization = False
        self.found: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.found.append((self.optimizers(), self.lr_schedulers()))


def test_none_in_manual_optimization() -> None:
    """No optimizer at all; the step may do what it likes."""
    module, trainer = Manual(lambda module: None), quiet()
    trainer.fit(module, loader(1))
    assert module.found == [([], None)]
    assert trainer.optimizers == []
    assert trainer.global_step == 0


def test_several_optimizers_and_schedulers() -> None:
    """In manual optimization: two lists, or a list of dicts; in the order given."""

    def pair(module: Any) -> list[torch.optim.Optimizer]:
        return [sgd(module.layer), sgd(module.other, 0.2)]

    def lists(module: Any) -> Any:
        made = pair(module)
        return made, [step_lr(optimizer) for optimizer in made]

    def dicts(module: Any) -> Any:
        return [
            {"optimizer": optimizer, "lr_scheduler": step_lr(optimizer)}
            for optimizer in pair(module)
        ]

    for configure in (lists, dicts):
        module, trainer = Manual(configure), quiet()
        trainer.fit(module, loader(1))
        ((optimizers, schedulers),) = module.found
        assert [o.param_groups[0]["lr"] for o in optimizers] == [0.1, 0.2]
        assert [s.optimizer for s in schedulers] == trainer.optimizers
        assert [o.optimizer for o in optimizers] == trainer.optimizers
        assert module.optimizers(use_pl_optimizer=False) == trainer.optimizers


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda m: 3,
            TypeError,
            "configure_optimizers must return an optimizer.*got 3",
        ),
        (
            lambda m: {"optimiser": sgd(m)},
            ValueError,
            "unknown keys .'optimiser'.*known are optimizer",
        ),
        (
            lambda m: {"optimizer": sgd(m), "lr_scheduler": {"interval": "step"}},
            ValueError,
            'has no "scheduler"',
        ),
        (
            lambda m: {"optimizer": sgd(m), "lr_scheduler": 3},
            TypeError,
            r"must have step\(\); got 3",
        ),
        (
            # A resumed run would begin it anew.
            lambda m: {
                "optimizer": sgd(m),
                "lr_scheduler": SimpleNamespace(step=lambda: None),
            },
            TypeError,
            r"must have state_dict\(\); got namespace",
        ),
    ],
)
def test_other_forms_are_refused(
    returned: Any, error: type[Exception], message: str
) -> None:
    """With what is accepted."""
    with pytest.raises(error, match=message):
        quiet().fit(Linear(optimizers=returned), loader())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"interval": "batch"}, 'interval must be "epoch" or "step"; got \'batch\''),
        ({"frequency": 0}, "frequency must be an integer from 1; got 0"),
        ({"freq": 2}, "unknown keys .'freq'"),
    ],
)
def test_scheduler_options_are_checked(option: dict[str, Any], message: str) -> None:
    """By name and value."""

    def configure(module: Module) -> Any:
        optimizer = sgd(module)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_lr(optimizer), **option},
        }

    with pytest.raises(ValueError, match=message):
        quiet().fit(Linear(optimizers=configure), loader())


# -- schedulers -----------------------------------------------------------------------------------------------------


class Rates(Callback):
    """Notes the learning rate with which each window steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: Any
    ) -> None:
        self.rates.append(round(optimizer.param_groups[0]["lr"] / 0.1, 6))


def scheduled(**options: Any) -> Callable[[Any], Any]:
    def configure(module: Module) -> Any:
        optimizer = sgd(module)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_lr(optimizer), **options},
        }

    return configure


@pytest.mark.parametrize(
    ("options", "arguments", "rates"),
    [
        ({"interval": "epoch"}, {"max_epochs": 3}, [1] * 4 + [0.5] * 4 + [0.25] * 4),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 4}, [1] * 8 + [0.5] * 8),
        ({"interval": "step"}, {}, [1, 0.5, 0.25, 0.125]),
        (
            {"interval": "step", "frequency": 3},
            {"max_epochs": 2},
            [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25],
        ),
        (
            {"interval": "step"},
            {"accumulate_grad_batches": 3, "max_epochs": 2},
            [1, 0.5, 0.25, 0.125],
        ),
    ],
)
def test_intervals(
    options: dict[str, Any], arguments: dict[str, Any], rates: list[float]
) -> None:
    """By epochs or by windows, each n-th of them."""
    callback = Rates()
    quiet(callback, **arguments).fit(Linear(optimizers=scheduled(**options)), loader())
    assert callback.rates == rates


def test_a_cycle_that_a_longer_fit_goes_on_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Made for as many steps as there are, it has more in a second fit, beyond which torch's raises."""

    def cycle(module: Module) -> Any:
        optimizer = sgd(module)
        steps = int(module.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module, whole = Evaluated(optimizers=cycle), Linear(optimizers=cycle)
    rates = Rates()
    trainer = quiet(max_epochs=1)
    trainer.fit(module, loader())
    trainer.max_epochs = 3
    trainer.callbacks.append(rates)
    trainer.fit(module, loader())
    assert "made for 4 steps, and is for 12 now" in caplog.text
    other = Rates()
    quiet(other, max_epochs=3).fit(whole, loader())
    # Its first step has the rate that the shorter cycle ended with.
    assert rates.rates[1:] == other.rates[5:]
    trainer.validate(module, loader(), verbose=False)
    assert trainer.num_training_batches == 4


def test_several_schedulers_of_one_optimizer() -> None:
    """Warm-up by step and decay by epoch, side by side."""

    def configure(module: Module) -> Any:
        optimizer = sgd(module)
        by_step = {
            "scheduler": LambdaLR(optimizer, lambda step: min(1, (step + 1) / 2)),
            "interval": "step",
        }
        return [optimizer], [by_step, ExponentialLR(optimizer, 0.5)]

    callback, trainer = Rates(), quiet(max_epochs=2)
    trainer.callbacks.append(callback)
    trainer.fit(Linear(optimizers=configure), loader(2))
    assert [config.interval for config in trainer.lr_scheduler_configs] == [
        "step",
        "epoch",
    ]
    assert callback.rates[:2] == [0.5, 1.0]


class Scripted(Evaluated):
    """``val_loss`` of epoch i is ``values[i]``; the scheduler is a plateau with patience 0."""

    def __init__(self, values: list[float], **options: Any) -> None:
        super().__init__()
        self.values, self.options = values, options

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.log("val_loss", self.values[self.current_epoch])

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self)
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": plateau,
                "monitor": "val_loss",
                **self.options,
            },
        }


def test_plateau() -> None:
    """It steps on the monitored value of its epoch."""
    callback = Rates()
    quiet(callback, max_epochs=5).fit(Scripted([3, 2, 2, 1, 1]), loader(1), loader(1))
    assert callback.rates == [1, 1, 1, 0.5, 0.5]


def test_plateau_with_frequency() -> None:
    """Every second epoch, where validation runs every second epoch."""
    callback = Rates()
    module = Scripted([9, 3, 9, 3, 9, 3], frequency=2)
    quiet(callback, max_epochs=6, check_val_every_n_epoch=2).fit(
        module, loader(1), loader(1)
    )
    assert callback.rates == [1, 1, 1, 1, 0.5, 0.5]


def test_plateau_by_step() -> None:
    """On a value that the training step logs."""

    class ByStep(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("seen", float([3, 2, 2, 1][batch_idx]))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "interval": "step"},
                "monitor": "seen",
            }

    callback = Rates()
    quiet(callback).fit(ByStep(), loader())
    assert callback.rates == [1, 1, 1, 0.5]


def test_a_monitor_that_was_not_logged() -> None:
    """Raises and lists what was logged; with ``strict=False`` the rate stays."""
    with pytest.raises(
        RuntimeError,
        match=r"monitors 'val_los', which was not logged.*logged were: val_loss",
    ):
        quiet().fit(Scripted([1], monitor="val_los"), loader(1), loader(1))
    callback = Rates()
    module = Scripted([1, 1, 1], monitor="val_los", strict=False)
    quiet(callback, max_epochs=3).fit(module, loader(1), loader(1))
    assert callback.rates == [1, 1, 1]


def test_a_plateau_without_monitor() -> None:
    """Is refused before training."""
    with pytest.raises(ValueError, match='ReduceLROnPlateau needs "monitor"'):
        quiet().fit(Scripted([1], monitor=None), loader(1), loader(1))


def test_a_scheduler_of_ones_own() -> None:
    """Anything with step() and a state; lr_scheduler_step can be overridden to step it otherwise."""

    class Counts:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def step(self, *args: Any) -> None:
            self.calls.append(args)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Own(Linear):
        def configure_optimizers(self) -> Any:
            return {
                "optimizer": sgd(self),
                "lr_scheduler": {"scheduler": counts, "interval": "step"},
            }

    class Otherwise(Own):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(self.global_step)

    counts = Counts()
    quiet().fit(Own(), loader())
    assert counts.calls == [()] * 4
    counts = Counts()
    quiet().fit(Otherwise(), loader())
    assert counts.calls == [(1,), (2,), (3,), (4,)]


# -- windows --------------------------------------------------------------------------------------------------------


class Tokens(Linear):
    """Batches of unequal weight, which the step tells as ``{"loss", "weight"}``."""

    def __init__(self, amounts: list[float], tensor: bool = False) -> None:
        super().__init__()
        self.amounts, self.tensor = amounts, tensor

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self.amounts[batch_idx]
        return {
            "loss": self.loss(batch),
            "weight": torch.tensor(weight) if self.tensor else weight,
        }


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_weighted_windows(tensor: bool, clip: float | None) -> None:
    """The window's gradient is the weighted mean of its batches', also in the last, shorter one."""
    amounts = [1.0, 5.0, 2.0, 7.0, 3.0]
    module = Tokens(amounts, tensor)
    raw = copy.deepcopy(module)
    quiet(accumulate_grad_batches=3, gradient_clip_val=clip).fit(module, loader(5))

    optimizer, batches = sgd(raw), list(loader(5))
    for window in ([0, 1, 2], [3, 4]):
        optimizer.zero_grad()
        total = sum(amounts[i] for i in window)
        loss: Any = sum(raw.loss(batches[i]) * amounts[i] / total for i in window)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(raw.parameters(), clip)
        optimizer.step()
    for mine, theirs in zip(weights(module), weights(raw), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weights_of_windows_of_one() -> None:
    """Nothing to average: the loss as it is."""
    module = Tokens([1.0, 5.0, 2.0, 7.0])
    plain = Linear()
    plain.load_state_dict(module.state_dict())
    quiet().fit(module, loader())
    quiet().fit(plain, loader())
    assert all(map(torch.equal, weights(module), weights(plain)))


def test_weights_for_some_batches_only() -> None:
    """Mixing them is an error."""

    class Mixed(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (
                self.loss(batch)
                if batch_idx
                else {"loss": self.loss(batch), "weight": 2}
            )

    with pytest.raises(
        RuntimeError,
        match=r"some batches of a window have a weight and others have none \(batch 1\)",
    ):
        quiet(accumulate_grad_batches=2).fit(Mixed(), loader())


@pytest.mark.parametrize("skip", [{0}, {1}, {2}, {0, 1}, {3}, {0, 1, 2}])
def test_batches_without_loss(skip: set[int]) -> None:
    """None leaves the batch out of its window's mean; a window without any loss does not step."""

    class Skips(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in skip else self.loss(batch)

    module = Skips()
    raw, trainer = copy.deepcopy(module), quiet(accumulate_grad_batches=3)
    trainer.fit(module, loader(4))
    optimizer, batches, steps = sgd(raw), list(loader(4)), 0
    for window in ({0, 1, 2} - skip, {3} - skip):
        if window:
            optimizer.zero_grad()
            loss: Any = sum(raw.loss(batches[i]) for i in sorted(window)) / len(window)
            loss.backward()
            optimizer.step()
            steps += 1
    assert trainer.global_step == steps
    for mine, theirs in zip(weights(module), weights(raw), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_dict_with_more_than_the_loss() -> None:
    """Reaches on_train_batch_end, the loss without its graph."""

    class More(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "note": batch_idx}

    class Outputs(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append(outputs)

    seen: list[Any] = []
    quiet(Outputs()).fit(More(), loader(2))
    assert [output["note"] for output in seen] == [0, 1]
    assert not any(output["loss"].requires_grad for output in seen)


def test_gradients_live_until_the_next_window() -> None:
    """Hooks and callbacks can look at them after the step."""

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            norms.append(module.layer.weight.grad.norm().item())

    norms: list[float] = []
    quiet(Looks()).fit(Linear(), loader(2))
    assert all(norm > 0 for norm in norms)
    assert len(norms) == 2


def test_overridden_parts_of_a_step() -> None:
    """optimizer_step, optimizer_zero_grad, backward and configure_gradient_clipping can be replaced."""

    class Parts(Linear):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            calls.append(("step", epoch, batch_idx))
            optimizer.step()

        def optimizer_zero_grad(
            self, epoch: int, batch_idx: int, optimizer: Any
        ) -> None:
            calls.append(("zero", epoch, batch_idx))
            optimizer.zero_grad()

        def backward(self, loss: Tensor) -> None:
            calls.append(("backward",))
            loss.backward()

        def configure_gradient_clipping(
            self,
            optimizer: Any,
            gradient_clip_val: Any = None,
            gradient_clip_algorithm: Any = None,
        ) -> None:
            calls.append(("clip", gradient_clip_val, gradient_clip_algorithm))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    calls: list[Any] = []
    module = Parts()
    plain = Linear()
    plain.load_state_dict(module.state_dict())
    quiet(gradient_clip_val=0.01).fit(module, loader(1))
    assert calls == [
        ("zero", 0, 0),
        ("backward",),
        ("clip", 0.01, "norm"),
        ("step", 0, 0),
    ]
    quiet(gradient_clip_val=0.01).fit(plain, loader(1))
    assert all(map(torch.equal, weights(module), weights(plain)))


# -- manual optimization --------------------------------------------------------------------------------------------


class Updates(Linear):
    """Manual optimization by ``update``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.update(self.loss(batch))


@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_update_equals_automatic_optimization(
    clip: dict[str, Any], accumulate: int, precision: str
) -> None:
    """Accumulation with a shorter last window, clipping, mixed precision: bit by bit."""
    automatic, manual = Linear(), Updates()
    manual.load_state_dict(automatic.state_dict())
    trainers = []
    for module in (automatic, manual):
        trainer = quiet(
            accumulate_grad_batches=accumulate,
            precision=precision,
            max_epochs=2,
            **clip,
        )
        trainer.fit(module, loader(5))
        trainers.append(trainer)
    assert all(map(torch.equal, weights(automatic), weights(manual)))
    assert trainers[0].global_step == trainers[1].global_step == 2 * -(-5 // accumulate)


@pytest.mark.parametrize("skip", [{0}, {1}, {2}, {1, 2}, {3}, {0, 1, 2}])
def test_batches_without_update(skip: set[int]) -> None:
    """They are left out of their window's mean, as with None in automatic optimization."""

    class Automatic(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in skip else self.loss(batch)

    class ByUpdate(Updates):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx not in skip:
                super().training_step(batch, batch_idx)

    modules, trainers = [Automatic(), ByUpdate()], []
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        trainers.append(quiet(accumulate_grad_batches=3, gradient_clip_val=0.5))
        trainers[-1].fit(module, loader(4))
    assert trainers[0].global_step == trainers[1].global_step
    for mine, theirs in zip(*map(weights, modules), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("manual", [False, True])
def test_a_window_that_ends_with_the_data(manual: bool) -> None:
    """The last window of a loader without length holds what there is, and its mean is over that."""
    module = Updates() if manual else Linear()
    raw, trainer = copy.deepcopy(module), quiet(accumulate_grad_batches=3)
    batches = list(loader(5))
    trainer.fit(module, (batch for batch in batches))
    optimizer = sgd(raw)
    for window in (batches[:3], batches[3:]):
        optimizer.zero_grad()
        loss: Any = sum(raw.loss(batch) for batch in window) / len(window)
        loss.backward()
        optimizer.step()
    assert trainer.global_step == 2
    for mine, theirs in zip(weights(module), weights(raw), strict=True):
        torch.testing.assert_close(mine, theirs)


class Accumulates(Callback):
    """Sets ``accumulate_grad_batches`` at a hook, by epochs or batches; notes the batches after which steps were."""

    def __init__(self, hook: str, batches: dict[int, int]) -> None:
        self.after: list[int] = []
        self.seen = 0

        def change(trainer: Any, *_: Any) -> None:
            now = trainer.current_epoch if hook == "on_train_epoch_start" else self.seen
            if now in batches:
                trainer.accumulate_grad_batches = batches[now]

        setattr(self, hook, change)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen = trainer.state.total_batches
        if trainer.run.step.stepped:
            self.after.append(self.seen)


@pytest.mark.parametrize("kind", [Linear, Updates])
@pytest.mark.parametrize(
    ("hook", "batches", "after"),
    [
        ("on_train_start", {0: 2}, [2, 4, 5, 7, 9, 10]),
        ("on_train_epoch_start", {0: 1, 1: 3}, [1, 2, 3, 4, 5, 8, 10]),
        ("on_train_epoch_start", {0: 3, 1: 1}, [3, 5, 6, 7, 8, 9, 10]),
        ("on_train_batch_start", {2: 2, 4: 1}, [1, 2, 4, 5, 6, 7, 8, 9, 10]),
        (
            "on_train_batch_start",
            {1: 3, 2: 1},
            [1, 4, 5, 6, 7, 8, 9, 10],
        ),  # inside a window: from the next one on
        ("on_before_zero_grad", {1: 2}, [1, 2, 4, 5, 7, 9, 10]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_accumulation_changed_in_a_hook(
    kind: Any, hook: str, batches: Any, after: list[int], stream: bool
) -> None:
    """It counts from the next window on; the gradients are the means of the windows as they are."""
    module, changes = kind(), Accumulates(hook, batches)
    raw, trainer = copy.deepcopy(module), quiet(changes, max_epochs=2)
    given = DataLoader(Told(10, 6), 2) if stream else loader(5)
    trainer.fit(module, given)
    assert changes.after == after
    optimizer, data, begin = sgd(raw), [*loader(5), *loader(5)], 0
    for end in after:
        optimizer.zero_grad()
        loss: Any = sum(raw.loss(batch) for batch in data[begin:end]) / (end - begin)
        loss.backward()
        optimizer.step()
        begin = end
    for mine, theirs in zip(weights(module), weights(raw), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_changed_accumulation_is_resumed() -> None:
    """A run that goes on inside an epoch has what was set at the epoch's start, or once in the run."""
    for hook, batches in (
        ("on_train_epoch_start", {0: 2, 1: 3}),
        ("on_train_batch_start", {4: 3}),
    ):
        whole, cut, rest = Linear(), Linear(), Linear()
        cut.load_state_dict(whole.state_dict())
        quiet(Accumulates(hook, batches), max_epochs=3).fit(whole, loader(7))
        stopped = quiet(Accumulates(hook, batches), max_epochs=3, max_steps=6)
        stopped.fit(cut, loader(7))
        stopped.save_checkpoint("cut.ckpt")
        quiet(Accumulates(hook, batches), max_epochs=3).fit(
            rest, loader(7), ckpt_path="cut.ckpt"
        )
        assert all(map(torch.equal, weights(whole), weights(rest))), hook
    with pytest.raises(
        ValueError, match="accumulate_grad_batches must be an integer from 1; got 0"
    ):
        stopped.accumulate_grad_batches = 0


def test_update_twice_in_a_batch() -> None:
    """Fine without accumulation; else an error, as the window could not count."""

    class Twice(Updates):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    quiet().fit(Twice(), loader(1))
    with pytest.raises(RuntimeError, match=r"update\(loss\) was called twice"):
        quiet(accumulate_grad_batches=2).fit(Twice(), loader(2))


def test_update_in_automatic_optimization() -> None:
    """Is refused with the way out."""

    class Wrong(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().update(self.loss(batch))

    with pytest.raises(RuntimeError, match=r"set self\.automatic_optimization = False"):
        quiet().fit(Wrong(), loader(1))


class GAN(Module):
    """A generator and a discriminator of one number."""

    def __init__(self, by_update: bool = False) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(1, 1), nn.Linear(1, 1)
        self.automatic_optimization = False
        self.by_update = by_update
        self.required: list[tuple[bool, bool]] = []

    def configure_optimizers(self) -> Any:
        return [sgd(self.generator), sgd(self.discriminator, 0.05)]

    def losses(self, noise: Tensor, real: Tensor) -> list[Callable[[], Tensor]]:
        loss = nn.functional.binary_cross_entropy_with_logits
        one, zero = torch.ones_like(real), torch.zeros_like(real)
        return [
            lambda: loss(self.discriminator(self.generator(noise)), one),
            lambda: (
                loss(self.discriminator(real), one)
                + loss(self.discriminator(self.generator(noise).detach()), zero)
            ),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer, loss in zip(optimizers, self.losses(*batch), strict=True):
            with self.toggled_optimizer(optimizer):
                self.required.append(
                    (
                        self.generator.weight.requires_grad,
                        self.discriminator.weight.requires_grad,
                    )
                )
                if self.by_update:
                    optimizer.update(loss())
                    continue
                self.manual_backward(loss())
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("by_update", [False, True])
def test_gan(by_update: bool) -> None:
    """Two optimizers in turn, each with the other's parameters switched off: as written by hand."""
    pairs = DataLoader(
        TensorDataset(torch.randn(8, 1), torch.randn(8, 1)), batch_size=2
    )
    module = GAN(by_update)
    raw, trainer = copy.deepcopy(module), quiet()
    trainer.fit(module, pairs)
    assert module.required == [(True, False), (False, True)] * 4
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert trainer.global_step == 4  # windows, whatever the number of optimizers

    optimizers = raw.configure_optimizers()
    for batch in pairs:
        for i, loss in enumerate(raw.losses(*batch)):
            raw.zero_grad()
            loss().backward()
            optimizers[i].step()
    for mine, theirs in zip(weights(module), weights(raw), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_toggle_keeps_frozen_parameters_frozen() -> None:
    """What the user froze is frozen afterwards too; toggle_model of the optimizer does the same."""

    class Frozen(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, _ = self.optimizers()
            self.toggle_optimizer(first)
            self.untoggle_optimizer(first)
            with first.toggle_model():
                self.required.append(
                    (
                        self.generator.weight.requires_grad,
                        self.discriminator.weight.requires_grad,
                    )
                )

    module = Frozen()
    module.discriminator.weight.requires_grad_(False)
    quiet().fit(module, DataLoader(TensorDataset(torch.ones(1, 1), torch.ones(1, 1))))
    assert module.required == [(True, False)]
    assert not module.discriminator.weight.requires_grad
    assert module.discriminator.bias.requires_grad


def test_schedulers_in_manual_optimization() -> None:
    """Are stepped by the user alone."""

    class Own(Updates):
        def configure_optimizers(self) -> Any:
            return scheduled(interval="step")(self)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if batch_idx == 1:
                self.lr_schedulers().step()

    callback = Rates()
    quiet(callback).fit(Own(), loader())
    assert callback.rates == [1, 1, 0.5, 0.5]


def test_it_passes_for_an_optimizer_of_its_class() -> None:
    """For torch's schedulers, too."""

    class Own(Updates):
        def on_train_start(self) -> None:
            optimizer: Any = self.optimizers()
            assert isinstance(optimizer, torch.optim.SGD)
            assert not isinstance(optimizer, torch.optim.Adam)
            self.schedule = step_lr(optimizer)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.schedule.step()

    callback = Rates()
    quiet(callback).fit(Own(), loader())
    assert callback.rates == [1, 0.5, 0.25, 0.125]


def test_lbfgs() -> None:
    """An optimizer with a closure works in manual optimization."""

    class Closure(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=20)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    module = Closure()
    quiet().fit(module, loader(1, batch_size=8))
    assert module.loss(next(iter(loader(1, batch_size=8)))).item() < 1e-6


# -- precision ------------------------------------------------------------------------------------------------------


class Typed(Linear):
    """Notes the types that its steps see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(1))
        self.types: set[tuple[torch.dtype, ...]] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x) + self.offset
        self.types.add((x.dtype, self.layer(x).dtype, torch.zeros(1).dtype))
        return (out - y).square().mean()


F32, F16, B16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("precision", "parameters", "types"),
    [
        ("32-true", F32, (F32, F32, F32)),
        ("16-mixed", F32, (F32, F16, F32)),
        ("bf16-mixed", F32, (F32, B16, F32)),
        ("16-true", F16, (F16, F16, F16)),
        ("bf16-true", B16, (B16, B16, B16)),
        ("64-true", F64, (F64, F64, F64)),
        (16, F32, (F32, F16, F32)),
        (Precision("mine", compute=torch.bfloat16), F32, (F32, B16, F32)),
    ],
)
def test_precisions(
    precision: Any, parameters: torch.dtype, types: tuple[torch.dtype, ...]
) -> None:
    """Types of parameters, of inputs, of a layer's output and of new tensors; and that it learns."""
    module, trainer = Typed(), quiet(precision=precision, max_epochs=5)
    before = module.loss(next(iter(loader()))).item()
    trainer.fit(module, loader())
    assert {parameter.dtype for parameter in module.parameters()} == {parameters}
    assert module.offset.dtype == (parameters if parameters != F32 else F32)
    assert module.types == {types}
    assert torch.get_default_dtype() == F32
    assert not torch.is_autocast_enabled("cpu")
    assert module.float().loss(next(iter(loader()))).item() < before


class Small(Linear):
    """With a loss whose gradients do not overflow in fp16 under the first loss scale, 65536."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) / 1000


class Overflow(Small):
    """The gradient of its third batch overflows all the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1e6 if batch_idx == 2 else 1)


class Scales(Callback):
    """Notes scale and weights after each batch."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.scales.append(trainer.engine.scaler.get_scale())
        self.weights.append(module.layer.weight.detach().clone())


def scaled(**fields: Any) -> Precision:
    return Precision("16-mixed", compute=torch.float16, loss_scaling=True, **fields)


class Gentle(Precision):
    """A policy that says as class attributes how it begins and grows."""

    init_scale = 8.0
    growth_interval = 2


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (
            scaled(
                init_scale=8.0,
                growth_interval=1,
                growth_factor=4.0,
                backoff_factor=0.25,
            ),
            [32.0, 128.0, 32.0, 128.0],
        ),
        (
            Gentle("16-mixed", compute=torch.float16, loss_scaling=True),
            [8.0, 16.0, 8.0, 8.0],
        ),
        (
            Gentle(
                "16-mixed", compute=torch.float16, loss_scaling=True, init_scale=4.0
            ),
            [4.0, 8.0, 4.0, 4.0],
        ),
    ],
)
def test_the_loss_scale_begins_and_grows_as_asked(
    precision: Precision, expected: list[float]
) -> None:
    """Under scales as low as these it is no scale that overflows, but the third batch."""
    callback = Scales()

    class Breaks(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx == 2 else 1)

    quiet(callback, precision=precision).fit(Breaks(), loader())
    assert callback.scales == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"init_scale": 0.0},
        {"growth_interval": 0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
    ],
)
def test_a_loss_scale_that_could_not_adapt(fields: dict[str, Any]) -> None:
    """The field and all values, where the policy is made."""
    with pytest.raises(
        ValueError,
        match=rf"16-mixed.*{next(iter(fields))}.*got .*{next(iter(fields.values()))}",
    ):
        scaled(**fields)


def test_an_overflow_skips_a_step_and_lowers_the_scale() -> None:
    """The GradScaler's business, on the CPU too."""
    callback = Scales()
    trainer = quiet(callback, precision="16-mixed", gradient_clip_val=1.0)
    trainer.fit(Overflow(), loader())
    assert callback.scales == [65536.0, 65536.0, 32768.0, 32768.0]
    steps = [
        not torch.equal(a, b)
        for a, b in zip(callback.weights, callback.weights[1:], strict=False)
    ]
    assert steps == [True, False, True]
    assert trainer.global_step == 4  # windows, stepped on or not


def test_gradients_before_the_step_are_unscaled() -> None:
    """on_before_optimizer_step sees their true size under a loss scale."""

    class Norms(Callback):
        def on_before_optimizer_step(
            self, trainer: Any, module: Any, optimizer: Any
        ) -> None:
            norms.append(module.layer.weight.grad.norm().item())

    norms: list[float] = []
    module = Small()
    for precision in ("16-mixed", "32-true"):
        quiet(Norms(), precision=precision).fit(copy.deepcopy(module), loader(1))
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_manual_steps_under_a_loss_scale() -> None:
    """backward and step by hand, clipped by clip_gradients: the same as in full precision, nearly."""

    class ByHand(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.001, "norm")
            optimizer.step()

    modules = [ByHand(), ByHand()]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, precision in zip(modules, ("16-mixed", "32-true"), strict=True):
        quiet(precision=precision).fit(module, loader())
    for half, full in zip(*map(weights, modules), strict=True):
        torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-6)


def test_a_plateau_that_the_module_steps_needs_no_monitor() -> None:
    """In manual optimization the loop steps no scheduler."""

    class ByHand(Linear):
        def __init__(self) -> None:
            super().__init__(optimizers=plateau)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().update(self.loss(batch))

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step(1.0)

    def plateau(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [ReduceLROnPlateau(optimizer, factor=0.5, patience=0)]

    trainer = quiet(max_epochs=3)
    trainer.fit(ByHand(), loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025
