"""Several optimizers on one loss, and manual optimization, in two processes: DDP by hand, FSDP and ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopwright.framework import Module
from tests.strategies.distributed import all_in_processes, quiet

# Starting processes takes long, with all that is compared in them.
pytestmark = pytest.mark.slow

NUM_EPOCHS, ACCUMULATE, CLIP = 2, 3, 0.3
# Ways of manual optimization.
HOW = ("in turn", "twice", "update")


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


class Manual(Net):
    """Steps by itself: each of two optimizers in turn, twice on one batch, or by ``update``."""

    def __init__(self, how: str) -> None:
        super().__init__("AdamW")
        self.automatic_optimization = False
        self.how = how
        self.head = nn.Linear(3, 3)

    def loss(self, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.how == "update":
            self.optimizers().update(self.loss(batch))
            return
        both = self.how == "in turn"
        for optimizer in self.optimizers() if both else [self.optimizers()] * 2:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, CLIP)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        if self.how == "in turn":
            head = torch.optim.SGD(self.head.parameters(), lr=0.1)
            return [torch.optim.AdamW(self.net.parameters(), lr=0.02), head]
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def train_manually(strategy: str, how: str) -> list[list[float]]:
    """The losses of each rank, in training and evaluation."""
    module = Manual(how)
    windows: dict[str, Any] = {}
    if how == "update":
        windows = {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    trainer = quiet(
        strategy=strategy, max_epochs=2, use_distributed_sampler=False, **windows
    )
    data = batches(trainer.global_rank)[:6]
    trainer.fit(module, data, data[:2])
    assert trainer.global_step == 2 * (3 if how == "update" else 6)
    return trainer.strategy.gather_objects(module.losses)


class Counts(Net):
    """Returns weights that differ between the ranks; keeps where it was validated, and reduces by a function."""

    def __init__(self) -> None:
        super().__init__("AdamW")
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": 2.0 + self.global_rank}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = 10.0 * self.global_rank + batch_idx
        self.log("spread", value, reduce_fx=lambda v: v.max() - v.min())

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.global_step)


def count_tokens() -> list[Any]:
    """By rank: where it was validated, the tokens of both, and the value of a function over the values of both."""
    module = Counts()
    trainer = quiet(use_distributed_sampler=False, validate_every="10 tokens")
    data = batches(trainer.global_rank)
    # The second rank validates on one batch less.
    trainer.fit(module, data, data[: 3 - trainer.global_rank])
    spread = float(trainer.callback_metrics["spread"])
    return trainer.strategy.gather_objects(
        (module.validated, trainer.num_tokens, spread)
    )


def refusal_of_parts() -> str:
    """Of a parameter that no forward of a submodule gathers."""

    class Bare(Manual):
        def __init__(self) -> None:
            super().__init__("update")
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="fsdp") as caught:
        quiet(strategy="fsdp").fit(Bare(), batches(0))
    return str(caught.value)


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
            **{
                f"{strategy} {how}": (train_manually, strategy, how)
                for how in HOW
                for strategy in ("ddp_find_unused_parameters_true", "fsdp")
            },
            "fsdp refuses a part": (refusal_of_parts,),
            "tokens": (count_tokens,),
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


@pytest.mark.parametrize("how", HOW)
def test_manual_optimization_on_shards(two: dict[str, Any], how: str) -> None:
    expected = two[f"ddp_find_unused_parameters_true {how}"]
    for sharded, whole in zip(two[f"fsdp {how}"], expected, strict=True):
        assert sharded == pytest.approx(whole, abs=1e-5)


def test_a_parameter_that_no_submodule_gathers(two: dict[str, Any]) -> None:
    assert "scale is in 0 of them" in two["fsdp refuses a part"]


def test_tokens_and_functions_are_those_of_all_processes(two: dict[str, Any]) -> None:
    """5 tokens a step; the values 0, 1, 2 and 10, 11."""
    assert two["tokens"] == [([2, 4, 6], 35.0, 11.0)] * 2


ZERO = ("deepspeed_stage_2", "deepspeed_stage_3")


def test_manual_optimization_under_zero() -> None:
    """With one optimizer; several are refused by name."""
    calls = {
        f"{strategy} {how}": (train_manually, strategy, how)
        for strategy in ("ddp", *ZERO)
        for how in HOW[1:]
    }
    told = all_in_processes(
        2, {**calls, "refused": (refusal, "deepspeed_stage_2", "Muon")}
    )
    assert "got Muon and AdamW" in told["refused"]
    for how in HOW[1:]:
        for strategy in ZERO:
            pairs = zip(told[f"{strategy} {how}"], told[f"ddp {how}"], strict=True)
            for sharded, whole in pairs:
                assert sharded == pytest.approx(whole, abs=1e-5)
