"""The Trainer computes what a hand-written loop computes, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Module, Trainer, seed_everything

STEPS = 200


class Regression(Module):
    """A small network with dropout; it notes its losses."""

    def __init__(self, scheduler: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1)
        )
        self.scheduler = scheduler
        self.losses: list[Tensor] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if not self.scheduler:
            return optimizer
        step_lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_lr, "interval": "step"},
        }


def loader(batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(batches * 4, 8, generator=generator),
        torch.randn(batches * 4, 1, generator=generator),
    )
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(**arguments) -> Trainer:
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def assert_equal_runs(ours: Any, losses: list[Tensor], module: Module) -> None:
    """Equal losses and equal weights, bit by bit."""
    assert len(losses) == len(ours.losses) >= STEPS
    assert torch.equal(torch.stack(ours.losses), torch.stack(losses))
    for (name, mine), (_, raw) in zip(
        ours.state_dict().items(), module.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, raw), name


@pytest.mark.parametrize("clip", [None, ("norm", 0.05), ("value", 0.01)])
@pytest.mark.parametrize("step_lr", [False, True])
@pytest.mark.parametrize(("accumulate", "batches"), [(1, 200), (3, 10)])
def test_losses_equal_a_hand_written_loop(clip, step_lr, accumulate, batches) -> None:
    """Plain, clipped, with StepLR per step, and accumulating 3 of 10 batches with a last window of one."""
    epochs = STEPS // batches
    seed_everything(7, verbose=False)
    ours = Regression(step_lr)
    clipping = (
        {}
        if clip is None
        else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    )
    trainer(max_epochs=epochs, accumulate_grad_batches=accumulate, **clipping).fit(
        ours, loader(batches)
    )

    seed_everything(7, verbose=False)
    raw, losses = Regression(step_lr), []
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.01)
    scheduler = (
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)
        if step_lr
        else None
    )
    for _ in range(epochs):
        for index, batch in enumerate(loader(batches)):
            start = index - index % accumulate
            window = min(accumulate, batches - start)
            loss = raw.loss(batch)
            losses.append(loss.detach())
            if index == start:
                optimizer.zero_grad()
            (loss / window if window > 1 else loss).backward()
            if index == start + window - 1:
                if clip is not None and clip[0] == "norm":
                    nn.utils.clip_grad_norm_(raw.parameters(), clip[1])
                elif clip is not None:
                    nn.utils.clip_grad_value_(raw.parameters(), clip[1])
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
    assert_equal_runs(ours, losses, raw)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_equals_a_hand_written_loop(precision) -> None:
    """Autocast around the step, and the GradScaler's scale, unscale, clip, step, update."""
    seed_everything(7, verbose=False)
    ours = Regression()
    trainer(max_epochs=1, precision=precision, gradient_clip_val=0.05).fit(
        ours, loader(STEPS)
    )

    seed_everything(7, verbose=False)
    raw, losses = Regression(), []
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.01)
    half = precision == "16-mixed"
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    for batch in loader(STEPS):
        with torch.autocast("cpu", dtype=torch.float16 if half else torch.bfloat16):
            loss = raw.loss(batch)
        losses.append(loss.detach())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(raw.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
    assert_equal_runs(ours, losses, raw)


class Adversaries(Module):
    """Two networks with an optimizer each, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(8, 8), nn.Linear(8, 1)
        self.losses: list[Tensor] = []

    def critic_loss(self, x: Tensor) -> Tensor:
        return (
            self.critic(self.generator(x).detach()).mean()
            - self.critic(x).mean()
            + self.critic(x).square().mean()
        )

    def generator_loss(self, x: Tensor) -> Tensor:
        return (
            -self.critic(self.generator(x)).mean()
            + (self.generator(x) - x).square().mean()
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, critic = self.optimizers()
        for optimizer, compute in (
            (critic, self.critic_loss),
            (generator, self.generator_loss),
        ):
            loss = compute(batch[0])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.detach())

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.SGD(self.critic.parameters(), 0.01),
        ]


def test_two_optimizers_in_manual_mode_equal_a_hand_written_loop() -> None:
    """Each optimizer steps when the module says so, and global_step counts batches, not optimizers."""
    seed_everything(7, verbose=False)
    ours = Adversaries()
    run = trainer(max_epochs=1)
    run.fit(ours, loader(STEPS))
    assert run.global_step == STEPS

    seed_everything(7, verbose=False)
    raw, losses = Adversaries(), []
    generator, critic = raw.configure_optimizers()
    for batch in loader(STEPS):
        for optimizer, compute in (
            (critic, raw.critic_loss),
            (generator, raw.generator_loss),
        ):
            loss = compute(batch[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_equal_runs(ours, losses, raw)


class Weighted(Regression):
    """Gives each batch a weight."""

    def __init__(self, weights: list) -> None:
        super().__init__()
        self.net[2] = nn.Identity()
        self.weights = weights

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict:
        return {"loss": self.loss(batch), "weight": self.weights[batch_idx]}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_large_weights_do_not_overflow(precision) -> None:
    """Weights such as token counts act by their ratio, so that half precision can hold the losses."""
    results = []
    for weights in ([4096, 2048] * 4, [2, 1] * 4):
        seed_everything(7, verbose=False)
        module = Weighted(weights)
        run = trainer(max_epochs=3, accumulate_grad_batches=2, precision=precision)
        run.fit(module, loader(8))
        if run.engine.scaler is not None:
            assert not run.engine.step_was_skipped
        results.append(next(module.net.parameters()).detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)])
def test_a_window_whose_weights_are_zero_changes_nothing(zero) -> None:
    """All tokens masked: no NaN."""
    seed_everything(7, verbose=False)
    module: Any = Weighted([zero] * 4)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    before = module.net[0].weight.detach().clone()
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(4))
    assert torch.equal(module.net[0].weight, before)


def test_a_second_step_in_a_batch_leaves_other_gradients_scaled_once() -> None:
    """Under 16-mixed in manual optimization, as in full precision."""

    class Twice(Adversaries):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            generator, critic = self.optimizers()
            generator.zero_grad()
            critic.zero_grad()
            self.manual_backward(
                self.generator_loss(batch[0]) / 1000
            )  # small, so that no gradient overflows
            self.clip_gradients(critic, 100.0)
            generator.step()
            generator.zero_grad()
            self.manual_backward(
                (self.generator(batch[0]) - batch[0]).square().mean() / 1000
            )
            generator.step()
            critic.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(part.parameters(), lr=100.0)
                for part in (self.generator, self.critic)
            ]

    weights = []
    for precision in ("32-true", "16-mixed"):
        seed_everything(7, verbose=False)
        module = Twice()
        trainer(max_epochs=1, precision=precision).fit(module, loader(1))
        weights.append(module.critic.weight.detach())
    torch.testing.assert_close(*weights, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("seed", [1.5, -1, 2**32, "one", "1.0", [1]])
def test_what_is_no_seed(seed: Any) -> None:
    """Is an error, and is not rounded."""
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to .*; got"):
        seed_everything(seed)
    numbers: list[Any] = [np.int64(3), "3", torch.tensor(3)]
    for number in numbers:
        assert seed_everything(number, verbose=False) == 3
