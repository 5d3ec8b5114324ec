"""Several optimizers on one loss in two processes: DDP by hand, and shards where the optimizers allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopwright.framework import Module
from tests.strategies.distributed import all_in_processes, quiet

NUM_EPOCHS, ACCUMULATE, CLIP = 2, 3, 0.3


class Net(Module):
    """Its matrices are trained by one kind of optimizer, all else by AdamW, each with a schedule."""

    def __init__(self, kind: str = "Muon") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 13), nn.LayerNorm(13), nn.Tanh(), nn.Linear(13, 3)
        )
        self.kind = kind
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p.ndim != 2]
        optimizers = [
            getattr(torch.optim, self.kind)(matrices, lr=0.02),
            torch.optim.AdamW(others, lr=0.01),
        ]
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
            for optimizer, gamma in zip(optimizers, (0.9, 0.8), strict=True)
        ]
        return optimizers, [
            {"scheduler": scheduler, "interval": "step"} for scheduler in schedulers
        ]


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(7, 12, 6, generator=generator)
    return list(zip(x, torch.randint(0, 3, (7, 12), generator=generator), strict=True))


def train(strategy: str, kind: str = "Muon", **options: Any) -> list[list[float]]:
    """The losses of each rank."""
    module = Net(kind)
    trainer = quiet(
        strategy=strategy,
        max_epochs=NUM_EPOCHS,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, batches(trainer.global_rank))
    assert len(trainer.optimizers) == 2
    return trainer.strategy.gather_objects(module.losses)


def train_by_hand() -> list[list[float]]:
    """The same under torch's DDP."""
    rank = torch.distributed.get_rank()
    module = Net()
    optimizers, schedulers = module.configure_optimizers()
    wrapped = DistributedDataParallel(module.net)
    data = batches(rank)
    losses: list[float] = []
    for _ in range(NUM_EPOCHS):
        for start in range(0, len(data), ACCUMULATE):
            window = data[start : start + ACCUMULATE]
            for optimizer in optimizers:
                optimizer.zero_grad()
            for index, (x, y) in enumerate(window):
                wrapped.require_backward_grad_sync = index == len(window) - 1
                loss = nn.functional.cross_entropy(wrapped(x), y)
                losses.append(loss.item())
                (loss / len(window)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler["scheduler"].step()
    by_rank: list[Any] = [None, None]
    torch.distributed.all_gather_object(by_rank, losses)
    return by_rank


def refusal(strategy: str, kind: str) -> str:
    with pytest.raises(ValueError, match=strategy) as caught:
        train(strategy, kind)
    return str(caught.value)


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    options = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP}
    return all_in_processes(
        2,
        {
            "ddp": (train_with, "ddp", "Muon", options),
            "by hand": (train_by_hand,),
            "fsdp": (train_with, "fsdp", "Muon", {}),
            "ddp, no windows": (train_with, "ddp", "Muon", {}),
            "fsdp refuses": (refusal, "fsdp", "Adafactor"),
        },
    )


def train_with(strategy: str, kind: str, options: dict[str, Any]) -> list[list[float]]:
    return train(strategy, kind, **options)


def test_losses_are_those_of_ddp_by_hand(two: dict[str, Any]) -> None:
    """Bit by bit, with windows and clipping over both."""
    assert [len(losses) for losses in two["ddp"]] == [NUM_EPOCHS * 7] * 2
    assert two["ddp"] == two["by hand"]


def test_muon_on_shards(two: dict[str, Any]) -> None:
    """It orthogonalizes in bfloat16, where shards are summed in another order."""
    for sharded, whole in zip(two["fsdp"], two["ddp, no windows"], strict=True):
        assert sharded == pytest.approx(whole, abs=5e-3)


def test_what_cannot_be_sharded_is_refused_by_name(two: dict[str, Any]) -> None:
    assert "no such arithmetic for Adafactor" in two["fsdp refuses"]
