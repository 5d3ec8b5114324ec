"""Automatic optimization by a closure: optimizers that need one, and overrides of optimizer_step that take one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import CheckpointError, Module, Trainer
from loopwright.framework.loop.closure import check_closure
from tests.framework.models import Linear, data, loader, quiet, weights
from tests.framework.recording import Observer, Recorder, Tiny, expand, recording


class Curve(Linear):
    """A small net with a smooth loss; ``Curve(optimizer)`` notes the losses of its steps."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(optimizers=lambda module: optimizer(module.parameters()))
        torch.manual_seed(2)
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        parameters, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def by_hand(
    make: Callable[[Any], Any], epochs: int, clip: float | None = None
) -> Curve:
    """A loop without a Trainer."""
    module = Curve(make)
    optimizer = make(module.parameters())
    for _ in range(epochs):
        for batch in loader():

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = module.training_step(batch, 0)
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                return loss

            optimizer.step(closure)
    return module


@pytest.mark.parametrize("clip", [None, 0.3])
def test_lbfgs_is_that_of_a_loop_by_hand(clip: float | None) -> None:
    """To the last bit; a step has several evaluations, and is one."""
    expected = by_hand(lbfgs, 3, clip)
    module = Curve(lbfgs)
    outputs: list[Any] = []
    watch = Observer(on_train_batch_end=lambda trainer, _: outputs.append(trainer))
    trainer = quiet(watch, max_epochs=3, gradient_clip_val=clip)
    trainer.fit(module, loader())
    assert module.losses == expected.losses
    assert all(map(torch.equal, weights(module), weights(expected)))
    assert len(module.losses) > 2 * trainer.global_step == 2 * len(outputs) == 24


def fit_elsewhere(make: Callable[[Any], Any], overriding: bool) -> list[float]:
    """The losses of the same run on Lightning."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        configure_optimizers = Curve.configure_optimizers
        training_step = Curve.training_step
        forward = Curve.forward
        loss = Curve.loss

        def __init__(self) -> None:
            super().__init__()
            curve = Curve(make)
            self.layer, self.configure, self.losses = curve.layer, curve.configure, []

    class Overrides(Net):
        optimizer_step = Overriding.optimizer_step

    module = Overrides() if overriding else Net()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=3, gradient_clip_val=0.3,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module.losses


class Overriding(Curve):
    """With Lightning's signature, as its users override it."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Any = None,
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
        optimizer.step(closure=optimizer_closure)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "overriding"), [(lbfgs, False), (lbfgs, True), (adam, True)]
)
def test_losses_are_those_of_lightning(
    make: Callable[[Any], Any], overriding: bool
) -> None:
    module = (Overriding if overriding else Curve)(make)
    quiet(max_epochs=3, gradient_clip_val=0.3).fit(module, loader())
    assert module.losses == pytest.approx(fit_elsewhere(make, overriding), rel=1e-6)


class Super(Curve):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Whatever(Curve):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class First(Curve):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        assert optimizer_closure().item() == self.losses[-1]
        optimizer.step()


class Three(Curve):
    """Without a closure: what the others do is the same."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        assert all(parameter.grad is not None for parameter in self.parameters())
        optimizer.step()


@pytest.mark.parametrize("kind", [Overriding, Super, Whatever, First, Three])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"precision": "16-mixed", "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_an_override_with_a_closure_trains_alike(
    kind: type[Curve], arguments: dict[str, Any]
) -> None:
    """The same weights as without one."""

    class Plain(Curve):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if kind is Overriding:
                for group in self.optimizers().param_groups:
                    group["lr"] *= 0.95

    plain, module = Plain(momentum), kind(momentum)
    for each in (plain, module):
        trainer = quiet(max_epochs=2, **arguments)
        trainer.fit(each, loader(5))
        assert trainer.global_step == 10
    assert module.losses == plain.losses
    assert all(map(torch.equal, weights(module), weights(plain)))


class Weighted(Super):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": [3, 1, 2, 5, 4][batch_idx]}


@pytest.mark.parametrize("kind", [Super, Weighted])
def test_windows(kind: type[Super]) -> None:
    """Of three batches, and of the two that are left; with weights, and without."""

    class Plain(kind):
        optimizer_step = Module.optimizer_step

    plain, module = Plain(momentum), kind(momentum)
    for each in (plain, module):
        trainer = quiet(max_epochs=2, accumulate_grad_batches=3)
        trainer.fit(each, loader(5))
        assert trainer.global_step == 4
    assert module.losses == plain.losses
    assert all(map(torch.equal, weights(module), weights(plain)))


def test_a_window_that_is_left() -> None:
    """What it has gathered is stepped on, through the override."""

    class Leaves(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> int | None:
            return -1 if batch_idx == 2 else None

    class Plain(Super):
        optimizer_step = Module.optimizer_step

    plain, module = Plain(momentum), Super(momentum)
    for each in (plain, module):
        trainer = quiet(Leaves(), accumulate_grad_batches=4)
        trainer.fit(each, loader(5))
        assert trainer.global_step == 1
    assert all(map(torch.equal, weights(module), weights(plain)))


class Sharpness(torch.optim.SGD):
    """Steps on the gradient at weights that are a little further up, as SAM does: two evaluations a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        super().step()
        return loss


def test_an_optimizer_that_evaluates_twice() -> None:
    """Each evaluation has gradients of its own."""

    def sharpness(parameters: Any) -> Sharpness:
        return Sharpness(parameters, lr=0.1)

    expected = by_hand(sharpness, 2)
    module = Super(sharpness)
    quiet(max_epochs=2).fit(module, loader())
    assert module.losses == expected.losses
    assert all(map(torch.equal, weights(module), weights(expected)))
    with pytest.raises(RuntimeError, match=r"called twice for batch 1.*window of 2"):
        quiet(accumulate_grad_batches=2).fit(Super(sharpness), loader())


@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_a_closure_that_nobody_calls(precision: str) -> None:
    """Is an error, as nothing would be trained; to call it and not to step is not."""

    class Forgets(Curve):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
        ) -> None:
            if batch_idx:
                optimizer.step()

    with pytest.raises(
        RuntimeError, match=r"Forgets.optimizer_step has not called its optimizer_clos"
    ):
        quiet(precision=precision).fit(Forgets(adam), loader())

    class Skips(Curve):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
        ) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    module = Skips(momentum)
    quiet(precision=precision).fit(module, loader())
    plain = Curve(momentum)

    class Odd(Callback):
        def on_before_optimizer_step(
            self, trainer: Any, pl_module: Any, optimizer: Any
        ) -> None:
            if trainer.batch_idx % 2 == 0:
                optimizer.zero_grad()

    quiet(Odd()).fit(plain, loader())
    if precision == "32-true":
        # SGD leaves a parameter without a gradient alone.
        assert all(map(torch.equal, weights(module), weights(plain)))
    assert len(module.losses) == 4


def test_no_loss_in_a_closure(caplog: pytest.LogCaptureFixture) -> None:
    """The batch is left out: no step, no old gradients; an optimizer that needs the loss cannot."""

    class Gives(Super):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 2) else loss

    class Plain(Gives):
        optimizer_step = Module.optimizer_step

    plain, module = Plain(momentum), Gives(momentum)
    for each in (plain, module):
        trainer = quiet()
        trainer.fit(each, loader())
        assert trainer.global_step == 2
    assert all(map(torch.equal, weights(module), weights(plain)))
    assert caplog.text.count("returned None") == 2
    with pytest.raises(RuntimeError, match="gave no loss for batch 1, and LBFGS"):
        quiet().fit(Gives(lbfgs), loader())


def test_the_order_of_hooks() -> None:
    """Lightning's: the step around the closure; in it the step, zero_grad, backward, then the hook and clipping."""
    recorder = Recorder()

    def make(cls: type, base: type, owner: str) -> Any:
        return recording(cls, base, owner, recorder, closure=True)

    module = make(Tiny, Module, "module")(scheduler="step")
    module.val_dataloader = None
    callback = make(Observer, Callback, "callback")()
    quiet(callback, limit_train_batches=2, accumulate_grad_batches=2).fit(module)
    begin = recorder.events.index("callback.on_train_batch_start")
    end = len(recorder.events) - recorder.events[::-1].index(
        "module.on_train_batch_end"
    )
    assert recorder.events[begin:end] == expand(
        """
        on_train_batch_start
        module.training_step
        on_before_zero_grad
        module.optimizer_zero_grad
        on_before_backward
        module.backward
        on_after_backward
        on_train_batch_end
        module.on_before_batch_transfer
        module.transfer_batch_to_device
        module.on_after_batch_transfer
        on_train_batch_start
        module.optimizer_step
        module.training_step
        on_before_backward
        module.backward
        on_after_backward
        on_before_optimizer_step
        module.configure_gradient_clipping
        module.lr_scheduler_step
        on_train_batch_end
        """,
        {},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"accumulate_grad_batches": 2},
            "LBFGS computes.*accumulate_grad_batches=2 takes several",
        ),
        ({"precision": "16-mixed"}, "LBFGS computes.*precision='16-mixed' scales"),
        ({"micro_batch": 1}, "micro_batch=1 runs a batch in parts"),
    ],
    ids=str,
)
def test_what_does_not_go_with_lbfgs(arguments: dict[str, Any], words: str) -> None:
    """Is refused before training, by name."""
    module = Curve(lbfgs)
    with pytest.raises(ValueError, match=words):
        quiet(**arguments).fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2"])
def test_strategies_that_cannot_step_by_lbfgs(strategy: str) -> None:
    """Each process has a part of the parameters; Adam's step takes a closure all the same."""
    trainer = quiet(devices=2, strategy=strategy)
    module = Super(lbfgs)
    with pytest.raises(ValueError, match=f"LBFGS.*strategy='{strategy}' steps on part"):
        check_closure(trainer, module, lbfgs(module.parameters()))
    check_closure(trainer, module, adam(module.parameters()))


def test_arguments_of_an_override() -> None:
    """Those of older versions are named."""

    class Old(Curve):
        def optimizer_step(
            self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_idx: Any, optimizer_closure: Any
        ) -> None: ...  # fmt: skip

    class Optional(Curve):
        def optimizer_step(
            self, epoch: Any = None, batch_idx: Any = None, optimizer: Any = None, optimizer_idx: Any = None,
            optimizer_closure: Any = None, on_tpu: Any = None,
        ) -> None: ...  # fmt: skip

    for kind in (Old, Optional):
        with pytest.raises(
            TypeError,
            match=r"optimizer_step.*called with \(epoch, batch_idx, optimizer, optimizer_closure\); with several",
        ):
            quiet().fit(kind(adam), loader())

    class Wants(torch.optim.SGD):
        def step(self, model: Any, loss: Any) -> None: ...

    with pytest.raises(ValueError, match=r"Wants.step takes \(model, loss\)"):
        quiet().fit(Curve(lambda p: Wants(p, lr=0.1)), loader())


def test_an_override_without_a_closure_may_bring_its_own() -> None:
    """As before: forward and backward have run."""

    class Own(Curve):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            gradients = [parameter.grad for parameter in self.parameters()]

            def closure() -> float:
                for parameter, gradient in zip(
                    self.parameters(), gradients, strict=True
                ):
                    parameter.grad = gradient
                return self.losses[-1]

            optimizer.step(closure)

    module = Own(lambda parameters: torch.optim.LBFGS(parameters, max_iter=1))
    before = weights(module)
    quiet().fit(module, loader())
    assert len(module.losses) == 4
    assert not any(map(torch.equal, before, weights(module)))


def test_lbfgs_resumes_to_the_last_bit() -> None:
    """Its history of directions is in the checkpoint; parameters in another order are refused."""

    def shuffled() -> DataLoader[Any]:
        return DataLoader(data(8), batch_size=2, shuffle=True)

    def fit(epochs: int, **arguments: Any) -> tuple[Curve, Trainer]:
        module = Curve(lbfgs)
        torch.manual_seed(3)
        saves = ModelCheckpoint("saved", every_n_train_steps=3, save_top_k=-1)
        trainer = quiet(saves, max_epochs=epochs)
        trainer.fit(module, shuffled(), **arguments)
        return module, trainer

    whole, _ = fit(3)
    again, trainer = fit(3, ckpt_path="saved/epoch=1-step=6.ckpt")
    assert trainer.global_step == 12
    assert again.losses == whole.losses[-len(again.losses) :]
    assert all(map(torch.equal, weights(whole), weights(again)))

    class Reversed(Curve):
        def configure_optimizers(self) -> Any:
            return lbfgs(list(self.parameters())[::-1])

    with pytest.raises(CheckpointError, match="stand in another order now"):
        quiet(max_epochs=3).fit(
            Reversed(lbfgs), shuffled(), ckpt_path="saved/epoch=1-step=6.ckpt"
        )
