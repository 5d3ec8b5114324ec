"""Several optimizers on one loss, in automatic optimization: each trains its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from loopwright.callbacks import Callback
from loopwright.framework import Module
from loopwright.strategies import Precision
from tests.framework.models import Linear, loader, quiet, weights

NUM_EPOCHS = 3


class Net(Module):
    """Matrices are trained by Muon, all else by AdamW, each with a schedule; keeps its losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)
        )
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.detach().clone())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p.ndim != 2]
        muon = torch.optim.Muon(matrices, lr=0.02)
        adam = torch.optim.AdamW(others, lr=0.01)
        decay = LambdaLR(muon, lambda step: 1 / (1 + step))
        return [
            {
                "optimizer": muon,
                "lr_scheduler": {"scheduler": decay, "interval": "step"},
            },
            {
                "optimizer": adam,
                "lr_scheduler": {
                    "scheduler": CosineAnnealingLR(adam, 10),
                    "interval": "step",
                    "frequency": 2,
                },
            },
        ]


def batches() -> list[tuple[Tensor, Tensor]]:
    """7 batches: with windows of 3, the last one of an epoch holds 1."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 12, 6, generator=generator)
    return list(zip(x, torch.randint(0, 3, (7, 12), generator=generator), strict=True))


def by_hand(accumulate: int, clip: float | None, half: bool, scale: float) -> Net:
    """The same loop in plain torch."""
    module = Net()
    muon, adam = module.configure_optimizers()
    optimizers = [muon["optimizer"], adam["optimizer"]]
    scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=scale)
    data = batches()
    step = 0
    for _ in range(NUM_EPOCHS):
        for start in range(0, len(data), accumulate):
            window = data[start : start + accumulate]
            for optimizer in optimizers:
                optimizer.zero_grad()
            for batch in window:
                with torch.autocast("cpu", torch.float16, enabled=half):
                    loss = module.loss(batch)
                scaler.scale(loss / len(window)).backward()
            overflows = False
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
                found = scaler._found_inf_per_device(optimizer) if half else {}
                overflows |= any(bool(flag) for flag in found.values())
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            step += 1
            if not overflows:
                scaler.step(optimizers[0])
                scaler.step(optimizers[1])
                muon["lr_scheduler"]["scheduler"].step()
                if step % 2 == 0:
                    adam["lr_scheduler"]["scheduler"].step()
            if half:
                scaler.update()
    return module


@pytest.mark.parametrize(
    ("accumulate", "clip", "precision", "scale"),
    [
        (1, None, "32-true", 1.0),
        (3, 0.3, "32-true", 1.0),
        (3, 0.3, "16-mixed", 2.0**16),
        # It overflows in the first steps.
        (1, 0.3, "16-mixed", 2.0**22),
    ],
)
def test_losses_are_those_of_a_loop_by_hand(
    accumulate: int, clip: float | None, precision: str, scale: float
) -> None:
    """Bit by bit, with one clock for both."""
    half = precision == "16-mixed"
    expected = by_hand(accumulate, clip, half, scale)
    how: Any = precision
    if half:
        how = Precision(
            precision, compute=torch.float16, loss_scaling=True, init_scale=scale
        )
    module = Net()
    trainer = quiet(
        max_epochs=NUM_EPOCHS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=how,
    )
    trainer.fit(module, batches())
    assert torch.stack(module.losses).equal(torch.stack(expected.losses))
    assert all(map(torch.equal, weights(module), weights(expected)))
    assert trainer.global_step == NUM_EPOCHS * -(-7 // accumulate)
    assert len(trainer.optimizers) == len(trainer.lr_scheduler_configs) == 2


@pytest.mark.parametrize("cut", [4, 7, 10])
def test_a_run_that_resumes_is_bitwise_the_whole_one(cut: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.3,
    }
    whole = Net()
    quiet(max_epochs=NUM_EPOCHS, **options).fit(whole, batches())
    first = quiet(max_epochs=NUM_EPOCHS, max_steps=cut, **options)
    first.fit(Net(), batches())
    first.save_checkpoint(tmp_path / "cut.ckpt")
    module = Net()
    resumed = quiet(max_epochs=NUM_EPOCHS, **options)
    resumed.fit(module, batches(), ckpt_path=tmp_path / "cut.ckpt")
    count = len(module.losses)
    assert 0 < count < len(whole.losses)
    assert torch.stack(module.losses).equal(torch.stack(whole.losses[-count:]))
    assert all(map(torch.equal, weights(module), weights(whole)))


def test_hooks_are_called_for_each() -> None:
    """In order; and the module's own clipping and steps, each with its optimizer."""

    class Parts(Net):
        def configure_gradient_clipping(
            self,
            optimizer: Any,
            gradient_clip_val: Any = None,
            gradient_clip_algorithm: Any = None,
        ) -> None:
            calls.append(("clip", type(optimizer).__name__))

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            calls.append(("step", type(optimizer.optimizer).__name__))
            optimizer.step()

    class Told(Callback):
        def on_before_zero_grad(
            self, trainer: Any, module: Any, optimizer: Any
        ) -> None:
            calls.append(("zero", type(optimizer).__name__))

        def on_before_optimizer_step(
            self, trainer: Any, module: Any, optimizer: Any
        ) -> None:
            calls.append(("before", type(optimizer).__name__))

    calls: list[Any] = []
    module = Parts()
    before = weights(module)
    quiet(Told(), gradient_clip_val=0.1).fit(module, batches()[:1])
    both = ["Muon", "AdamW"]
    assert calls == [
        (name, kind) for name in ("zero", "before", "clip", "step") for kind in both
    ]
    assert not any(map(torch.equal, before, weights(module)))


def shared(module: Any) -> Any:
    return [
        torch.optim.SGD(module.parameters(), 0.1),
        torch.optim.Adam([module.layer.bias]),
    ]


def with_closure(module: Any) -> Any:
    return [
        torch.optim.LBFGS([module.layer.weight]),
        torch.optim.Adam([module.layer.bias]),
    ]


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (shared, "layer.bias is in SGD and in Adam"),
        (with_closure, "2 optimizers, and LBFGS's step"),
    ],
)
def test_optimizers_that_cannot_step_together(
    configure: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quiet().fit(Linear(optimizers=configure), loader())


def test_others_take_their_place_in_the_same_number() -> None:
    class Replaces(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            trainer.optimizers = trainer.optimizers[:1]

    with pytest.raises(ValueError, match="began with 2 and cannot go on with 1"):
        quiet(Replaces()).fit(Net(), batches())


def test_no_optimizer_at_all(caplog: pytest.LogCaptureFixture) -> None:
    """Losses and gradients are computed, windows are counted, nothing is trained; and a line says so."""

    class Watches(Linear):
        def on_after_backward(self) -> None:
            assert self.layer.weight.grad is not None
            norms.append(float(self.layer.weight.grad.norm()))

    norms: list[float] = []
    module = Watches(optimizers=lambda module: None)
    before = weights(module)
    trainer = quiet(max_steps=6, max_epochs=-1, gradient_clip_val=0.1)
    trainer.fit(module, loader(1))
    assert "no optimizer" in caplog.text
    assert trainer.global_step == 6
    assert trainer.optimizers == []
    assert all(map(torch.equal, before, weights(module)))
    assert norms == [norms[0]] * 6, "the gradients of a window are its own"
