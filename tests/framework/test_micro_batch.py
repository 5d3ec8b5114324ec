"""Batches in parts, and going on after memory ran out."""

from __future__ import annotations

from collections import UserList, deque
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback
from loopwright.framework import Module
from loopwright.framework.data.batches import slice_batch
from loopwright.strategies import DDPStrategy
from tests.strategies.distributed import in_processes, quiet

PLACES = ("forward", "backward", "after_backward")


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("the device is full")


class Limited(Module):
    """Runs out of memory with more than ``limit`` samples at once, on one rank, at a place of the step."""

    def __init__(
        self,
        limit: int = 1000,
        place: str = "forward",
        rank: int = 0,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.limit, self.place, self.rank, self.weighted = limit, place, rank, weighted
        self.full = False
        self.losses: list[float] = []
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.sizes.append(len(x))
        self.full = len(x) > self.limit and self.trainer.global_rank == self.rank
        hidden = torch.relu(self.first(x))
        if self.full and self.place == "backward":
            hidden = _FailingBackward.apply(
                hidden
            )  # the last layer has its gradient when this fails
        weights = x[:, :1].abs() if self.weighted else torch.ones(len(x), 1)
        loss = (weights * (self.last(hidden) - y).square()).sum() / weights.sum()
        self.log(
            "error", (self.last(hidden) - y).abs().mean(), on_step=True, on_epoch=True
        )
        self.log(
            "samples", float(len(x)), on_epoch=True, on_step=False, reduce_fx="sum"
        )
        if self.full and self.place == "forward":
            raise torch.OutOfMemoryError("the device is full")
        return {"loss": loss, "weight": weights.sum()} if self.weighted else loss

    def on_after_backward(self) -> None:
        if self.full and self.place == "after_backward":
            raise torch.OutOfMemoryError("the device is full")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def train(
    micro_batch: Any = None, samples: int = 44, accumulate: int = 1, **arguments: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Limited(**arguments)
    x = torch.randn(samples, 4)
    loader = DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True
    )
    trainer = quiet(
        micro_batch=micro_batch, max_epochs=2, accumulate_grad_batches=accumulate
    )
    trainer.fit(model, loader)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "losses": model.losses,
        "sizes": model.sizes,
        "metrics": {
            name: float(value) for name, value in trainer.callback_metrics.items()
        },
        "micro_batch": trainer.state.micro_batch,
        "steps": trainer.global_step,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(
        found["weights"], expected["weights"], rtol=2e-4, atol=2e-5
    )
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    assert found["steps"] == expected["steps"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_changes_nothing_but_the_parts(
    place: str, accumulate: int, weighted: bool
):
    whole = train(accumulate=accumulate, weighted=weighted)
    parts = train(
        "auto", limit=3, place=place, accumulate=accumulate, weighted=weighted
    )
    assert parts["micro_batch"] == 2
    assert parts["sizes"][-1] == 2
    assert_same(parts, whole)


def test_a_size_of_ones_own():
    whole, parts = train(), train(3)
    assert parts["sizes"][:3] == [3, 3, 2]
    assert_same(parts, whole)


@pytest.fixture(scope="module")
def in_two() -> dict[Any, Any]:
    return in_processes(2, _train_in_two)


def _train_in_two() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for weighted in (False, True):
        for accumulate in (1, 2):
            found[weighted, accumulate, None] = train(
                accumulate=accumulate, weighted=weighted
            )
            for place in PLACES:
                found[weighted, accumulate, place] = train(
                    "auto",
                    accumulate=accumulate,
                    weighted=weighted,
                    limit=3,
                    place=place,
                    rank=1,
                )
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_all_processes_divide_their_batches_when_one_runs_out(
    in_two: dict[Any, Any], place: str, accumulate: int, weighted: bool
):
    parts = in_two[weighted, accumulate, place]
    assert parts["micro_batch"] == 2
    assert_same(parts, in_two[weighted, accumulate, None])


def test_batch_norm_and_random_numbers_of_a_failed_attempt_leave_no_trace():
    class Noisy(Limited):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.norm = nn.BatchNorm1d(4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            x = nn.functional.dropout(self.norm(x), 0.5)
            return super().training_step((x, y), batch_idx)

    def run(micro_batch: Any, **arguments: Any) -> Any:
        torch.manual_seed(0)
        model, x = Noisy(**arguments), torch.randn(16, 4)
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
        quiet(micro_batch=micro_batch).fit(model, loader)
        return model.state_dict()

    fixed, found = run(4), run("auto", limit=4, place="backward")
    for name, value in fixed.items():
        assert torch.equal(found[name], value), name


def test_a_resumed_run_goes_on_with_the_parts_that_were_found(tmp_path: Any):
    whole = train("auto", limit=3)

    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    torch.manual_seed(0)
    model = Limited(limit=3)
    x = torch.randn(44, 4)
    loader = DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True
    )
    quiet(micro_batch="auto", max_epochs=2, callbacks=[Save()]).fit(model, loader)
    resumed = Limited(limit=3)
    quiet(micro_batch="auto", max_epochs=2).fit(
        resumed, loader, ckpt_path=tmp_path / "four.ckpt"
    )
    assert max(resumed.sizes) == 2
    for name, value in whole["weights"].items():
        assert torch.equal(resumed.state_dict()[name], value), name


class Skips(Module):
    """Leaves the first part of its batch out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.outputs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        return None if x[0] == 1 else self.layer(x).sum() * 0 + x.mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_part_that_is_left_out_does_not_shift_what_the_others_count():
    module = Skips()
    samples = torch.tensor([[1.0], [1.0], [2.0], [2.0], [8.0]])
    quiet(micro_batch=2).fit(module, DataLoader(TensorDataset(samples), 5))
    assert module.outputs == [pytest.approx((2 + 2 + 8) / 3)]


def test_a_strategy_that_is_used_again_averages_as_ever():
    strategy = DDPStrategy()
    assert quiet(micro_batch=2, strategy=strategy).strategy.keeps_gradients_local
    assert not quiet(strategy=strategy).strategy.keeps_gradients_local


def test_one_sample_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="single sample"):
        train("auto", limit=0)


def test_other_errors_are_not_taken_for_it():
    class Wrong(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    x = torch.randn(8, 4)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        quiet(micro_batch="auto").fit(
            Wrong(), DataLoader(TensorDataset(x, x), batch_size=4)
        )


@pytest.mark.parametrize("value", [0, -1, 1.5, "half", True])
def test_a_size_that_is_none_is_refused(value: Any):
    with pytest.raises(ValueError, match="micro_batch"):
        quiet(micro_batch=value)


def test_manual_optimization_is_refused():
    class Manual(Limited):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    x = torch.randn(8, 4)
    with pytest.raises(
        ValueError, match="micro_batch='auto' is for automatic optimization"
    ):
        quiet(micro_batch="auto").fit(
            Manual(), DataLoader(TensorDataset(x, x), batch_size=4)
        )


def test_dicts_and_lists_are_divided():
    seen: list[Any] = []

    class Texts(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((batch["text"], batch["scale"].tolist(), len(batch["x"])))
            return self.last(torch.relu(self.first(batch["x"]))).mean()

    batch = {
        "x": torch.randn(3, 4),
        "text": ["a", "b", "c"],
        "scale": torch.tensor(2.0),
    }
    quiet(micro_batch=2).fit(Texts(), [batch])
    assert seen == [(["a", "b"], 2.0, 2), (["c"], 2.0, 1)]


def test_lists_and_arrays_of_samples_are_divided_and_columns_are_not():
    batch = {
        "x": torch.arange(2),
        "texts": ["a", "b"],
        "boxes": [{"label": "cat", "size": (1, 2)}, {"label": "dog", "size": (3, 4)}],
        "scores": [torch.tensor(0.1), torch.tensor(0.2)],
        "ids": numpy.array([7, 8]),
        "user list": UserList("ab"),
        "deque": deque("ab"),
        "columns": [torch.arange(2), torch.arange(2) * 10],
        "about": "it",
    }
    part = slice_batch(batch, 1, 2, 2)
    assert part["x"].tolist() == part["columns"][0].tolist() == [1]
    assert part["columns"][1].tolist() == [10]
    assert part["texts"] == ["b"]
    assert part["boxes"] == [{"label": "dog", "size": (3, 4)}]
    assert part["scores"] == [torch.tensor(0.2)]
    assert part["ids"].tolist() == [8]
    assert list(part["user list"]) == list(part["deque"]) == ["b"]
    assert part["about"] == "it"


def test_what_cannot_be_divided_is_named():
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
    for batch, told in (
        (packed, "got a PackedSequence"),
        (["text"], "micro_batch: .* no tensor with a dimension"),
    ):
        with pytest.raises((TypeError, ValueError), match=told):
            quiet(micro_batch=1).fit(Limited(), [batch])
